"""Pictures and texts to vectors as a run has them: by its very model, precision and preprocessing, without Ray."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.images.decode import DecodeSpec
from pipeline.models import ModelInfo, inspect_model
from pipeline.online import BATCH_IMAGES, fetched, pixels
from pipeline.predictors.batches import Wanted
from schemas.errors import CheckpointError, ImageError, SpecError
from schemas.run import RunRecord, difference
from schemas.spec import FetchSpec

if TYPE_CHECKING:
    from pipeline.models.zero_shot import TextModel
    from pipeline.predictors.torch_predictor import TorchPredictor

Floats = NDArray[np.float32]

# Decoded pictures that are held at once.
_HELD = 4 * BATCH_IMAGES
# What `pooled` is where images and texts have a space in common: CLIP and LiT, SigLIP, LiT without a projection.
_SHARED_WITH_TEXT = ("projected_cls", "attention_pool", "cls")
TEXT_FEATURE = "pooled"
# Of these families some checkpoints have a text tower. BEiT's `pooled` may be called as LiT's.
_WITH_TEXT = ("clip", "siglip", "vit")


class Embedder:
    """Vectors of one feature by the model of a run, which is read when it is first needed.

    `model` says where that model lies now, if it has moved. Whatever needs it raises SpecError for a run without a
    model, and CheckpointError if what is found is not the model of the run.
    """

    def __init__(
        self,
        record: RunRecord,
        feature: str,
        *,
        model: str | None = None,
        vocabulary: str | None = None,
        storage_options: Mapping[str, Any] = {},
    ) -> None:
        self._record, self._feature, self._model = record, feature, model
        self._vocabulary = vocabulary or record.spec.get("vocabulary")
        self._storage_options = storage_options
        self._fetch = FetchSpec()

    def images(self, addresses: list[str]) -> Floats:
        """Vectors (n, D) of pictures by path or URL. Raises SpecError naming one that cannot be read."""
        uris = [address if "://" in address else str(Path(address).absolute()) for address in addresses]
        decoded = self._decoded(fetched(uris, self._fetch, self._storage_options))
        named = zip(uris, decoded, strict=True)
        vectors = []
        while some := list(islice(named, _HELD)):
            for uri, found in some:
                if isinstance(found, ImageError):
                    raise SpecError(f"--image {uri}: {found.message}")
            vectors.append(self._vectors([found for _, found in some]))
        return np.concatenate(vectors)

    def image(self, data: bytes) -> Floats:
        """The vector (D,) of the bytes of a picture. Raises ImageError for what is no picture."""
        (found,) = self._decoded([data])
        if isinstance(found, ImageError):
            raise found
        return self._vectors([found]).reshape(-1)

    def texts(self, texts: list[str]) -> Floats:
        """Vectors (n, D) by the text tower of the model. Raises SpecError for a model without one."""
        return self._text.embed(texts)

    def _decoded(self, files: Iterable[bytes | ImageError]) -> Iterator[NDArray[np.uint8] | ImageError]:
        decode = self._record.spec.get("decode", "exact")
        return pixels(files, DecodeSpec(self._info.preprocessing, decode, self._fetch.max_pixels))

    def _vectors(self, decoded: list[Any]) -> Floats:
        vectors: Floats = self._predictor.predict(np.stack(decoded)).features[self._feature].astype(np.float32)
        return vectors

    @cached_property
    def _info(self) -> ModelInfo:
        return model_of(self._record, self._model, self._storage_options)

    @cached_property
    def _text(self) -> "TextModel":
        from pipeline.models import load_text

        return load_text(self._info, self._vocabulary)

    @cached_property
    def _predictor(self) -> "TorchPredictor":
        from pipeline.predictors.torch_predictor import TorchPredictor

        wanted = Wanted((self._feature,), (self._info.vector_sizes[self._feature],), "float32", 0, (), False)
        return TorchPredictor(self._info, wanted, dtype=self._record.model.dtype, batch_size=BATCH_IMAGES)


def may_have_texts(record: RunRecord) -> bool:
    """Whether texts may share a space with `pooled` of this run; for sure, only its checkpoint can tell."""
    return record.model.pooled in _SHARED_WITH_TEXT and record.model.family in _WITH_TEXT


def check_texts(record: RunRecord, feature: str, texts: Sequence[str]) -> None:
    """Raise SpecError where `feature` is in no space that the run's model has in common with texts, or one is empty."""
    model = record.model
    if model.pooled not in _SHARED_WITH_TEXT:
        raise SpecError(
            f"--text {texts[0]}: {model.name} has no text tower (ViT, BEiT and the like have none; CLIP, SigLIP and "
            "LiT do); search by --image, --row, --uri or --vector"
        )
    if feature != TEXT_FEATURE:
        raise SpecError(f"--text: texts share a space with `pooled`, not with `{feature}`; leave out --features")
    if not all(text.strip() for text in texts):
        raise SpecError("--text is empty; say in words what to look for")


def model_of(record: RunRecord, model: str | None, storage_options: Mapping[str, Any]) -> ModelInfo:
    """The model of a run, found where the record names it, or at `model`.

    Raises SpecError for a run without one, CheckpointError where the weights or the preprocessing are others by now.
    """
    wanted = record.model
    if wanted.family == "null":
        raise SpecError("this run was made without a model (--backend null): search by --row, --uri or --vector")
    info = inspect_model(
        model or wanted.name,
        revision=wanted.revision if model is None else None,
        image_size=record.spec.get("image_size"),
        beit_final_norm=bool(record.spec.get("beit_final_norm")),
        storage_options=storage_options,
    )
    recorded, found = (one.preprocessing.model_dump(mode="json") for one in (wanted, info))
    changed = difference(recorded, found, "preprocessing.")
    if info.digest != wanted.digest:
        changed.insert(0, f"other weights: digest {info.digest[:12]}, the run's is {wanted.digest[:12]}")
    if changed:
        raise CheckpointError(
            f"{info.name} is not the model of this run any more, so its vectors cannot be compared "
            f"({'; '.join(changed)}). Put that model back; `search` also takes --model for where it is now"
        )
    return info

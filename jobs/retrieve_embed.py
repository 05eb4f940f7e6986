"""Pictures and texts to vectors for `search`: by the very model, precision and preprocessing of the run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from schemas.errors import CheckpointError, SpecError

if TYPE_CHECKING:
    from pipeline.models import ModelInfo
    from pipeline.retrieval.search import Embed
    from pipeline.retrieval.store import FeatureStore
    from schemas.run import RunRecord


def embedder(store: "FeatureStore", feature: str, model: str | None, storage_options: dict[str, Any]) -> "Embed":
    """A function from paths or URLs to vectors (n, D). The model is read when it is first called.

    `model` says where the run's model lies now, if it has moved. The function raises CheckpointError if what is found
    there is not the model of the run, and SpecError naming a picture that cannot be read.
    """

    def embed(images: list[str]) -> Any:
        return _embed(store, feature, model_of(store.record, model, storage_options), images, storage_options)

    return embed


# What `pooled` is where images and texts have a space in common: CLIP and LiT, SigLIP, LiT without a projection.
_SHARED_WITH_TEXT = ("projected_cls", "attention_pool", "cls")


class Embedders(NamedTuple):
    """For `--image` and for `--text`."""

    images: "Embed"
    texts: "Embed"


def text_embedder(
    store: "FeatureStore", feature: str, vocabulary: str | None, model: str | None, storage_options: dict[str, Any]
) -> "Embed":
    """A function from texts to vectors (n, D) by the text tower of the run's model, read when it is first called.

    It raises SpecError for a model without one, and CheckpointError as `embedder`'s does.
    """

    def embed(texts: list[str]) -> Any:
        from pipeline.models import load_text

        info = model_of(store.record, model, storage_options)
        return load_text(info, vocabulary or store.record.spec.get("vocabulary")).embed(texts)

    return embed


def check_text(store: "FeatureStore", feature: str, text: str) -> None:
    """Raise SpecError where `feature` is in no space that the run's model has in common with texts."""
    model = store.record.model
    if model.pooled not in _SHARED_WITH_TEXT:
        raise SpecError(
            f"--text {text}: {model.name} has no text tower (ViT, BEiT and the like have none; CLIP, SigLIP and LiT "
            "do); search by --image, --row, --uri or --vector"
        )
    if feature != "pooled":
        raise SpecError(f"--text: texts share a space with `pooled`, not with `{feature}`; add --features pooled")


def model_of(record: "RunRecord", model: str | None, storage_options: dict[str, Any]) -> "ModelInfo":
    """The model of a run, found where the record names it, or at `model`.

    Raises SpecError for a run without one, CheckpointError where the weights or the preprocessing are others by now.
    """
    from pipeline.models import inspect_model
    from schemas.run import difference

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


def _embed(
    store: "FeatureStore", feature: str, info: "ModelInfo", images: list[str], storage_options: dict[str, Any]
) -> Any:
    import numpy as np

    from pipeline.images.stage import Reading, fetch_and_decode
    from pipeline.predictors.batches import Wanted
    from pipeline.predictors.torch_predictor import TorchPredictor

    dim = store.check_feature(feature)
    wanted = Wanted((feature,), (dim,), "float32", 0, (), False)
    dtype = store.record.model.dtype
    predict = TorchPredictor(info, wanted, dtype=dtype, batch_size=min(8, len(images)), cuda=False)
    found = []
    decode = store.record.spec.get("decode", "exact")
    reading = Reading(info.preprocessing, decode=decode, storage_options=storage_options)
    for decoded in fetch_and_decode(_manifest(images), reading, batch_rows=32):
        table = predict(decoded)
        for item in table.select(["uri", "error", "message"]).to_pylist():
            if item["error"]:
                raise SpecError(f"--image {item['uri']}: {item['message']}")
        found += table.column(feature).to_pylist()
    return np.array(found, np.float32)


def _manifest(images: list[str]) -> Any:
    import pyarrow as pa

    from schemas.tables import manifest_schema

    uris = [image if "://" in image else str(Path(image).absolute()) for image in images]
    rows = [{"row": row, "uri": uri} for row, uri in enumerate(uris)]
    return pa.Table.from_pylist(rows, schema=manifest_schema([]))

"""What a checkpoint is, before anything heavy is done with it."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.models.architecture import Architecture, parameter_count
from pipeline.models.families import described_as, recognise
from pipeline.models.formats import npz_vit, timm
from pipeline.models.formats.format import Config, Format, Shapes
from pipeline.models.labels import config_labels, read_label_file
from pipeline.models.npz import is_all_zeros
from pipeline.models.preprocessing import read_preprocessing
from pipeline.models.remap import Plan, check, plan, require_depth
from pipeline.models.resolve import resolve
from pipeline.models.weights import Weights, find_weights, read_json, read_shapes
from schemas.errors import CheckpointError, SpecError
from schemas.preprocessing import Preprocessing

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

HASH_CHUNK_BYTES = 8 * 1024 * 1024


class ZeroShot(NamedTuple):
    """A classifier made of words. `weights` are float32 (labels, pooled_size) in C order, each row of length 1.

    `digest` is the SHA-256 over what they were made from besides the checkpoint: labels, templates and vocabulary.
    """

    templates: tuple[str, ...]
    digest: str
    weights: bytes
    scale: float
    bias: float


class OwnHead(NamedTuple):
    """A linear classifier that the user trained. `weight` is float32 (labels, D) in C order, `bias` (labels,)."""

    digest: str
    weight: bytes
    bias: bytes


@dataclass(frozen=True)
class ModelInfo:
    """A checkpoint, described. Small and picklable: it travels to the actors, which load by it.

    `name` leads to it: an absolute path, an address or a hub name; `revision` is the commit of a hub model. `digest` is
    the SHA-256 over config and weights. `labels` are in the order of the logits, empty without a classifier;
    `label_digest` is the SHA-256 of the file they come from, if it was one of the user's. `multi_label`: each score is
    a sigmoid of its own, as it also is for a single label; `regression`: the head gives quantities, of which there are
    no scores. `zero_head`: so many classes has a head that was left out because it is all zeros. `plan` says how the
    tensors map to ours.
    `zero_shot` is set where the labels are the user's own words, `head` where the classifier is the user's own.
    """

    name: str
    revision: str | None
    folder: str
    family: str
    layout: str
    architecture: str
    digest: str
    labels: tuple[str, ...]
    multi_label: bool
    preprocessing: Preprocessing
    parameters: int
    beit_final_norm: bool
    network: Architecture
    plan: Plan
    zero_shot: ZeroShot | None = None
    label_digest: str | None = None
    head: OwnHead | None = None
    regression: bool = False
    zero_head: int = 0

    @property
    def hidden_size(self) -> int:
        """Numbers in `cls`."""
        return self.network.width

    @property
    def pooled_size(self) -> int:
        """Numbers in `pooled`."""
        return self.network.feature_width

    @property
    def has_cls(self) -> bool:
        """Whether there is a CLS token."""
        return self.network.class_token

    @property
    def num_labels(self) -> int:
        """Classes of the classifier, 0 without one."""
        return self.network.num_labels

    @property
    def pooled(self) -> str:
        """Which image-level representation `pooled` is."""
        return self.network.pooled

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of what the model receives, in pixels."""
        return self.preprocessing.output_size

    @property
    def vector_sizes(self) -> dict[str, int]:
        """Numbers in each of the vectors of an image, by feature."""
        return {"cls": self.hidden_size, "pooled": self.pooled_size}

    @property
    def without_classifier(self) -> str:
        """In words, for an error, that there are no labels."""
        why = f": its head of {self.zero_head:,} classes is all zeros" if self.zero_head else ""
        return f"{self.name} ({self.architecture}) has no classifier{why}"


def inspect_model(
    model: str,
    *,
    revision: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    beit_final_norm: bool = False,
    label_file: str | None = None,
    storage_options: Mapping[str, Any] = {},
) -> ModelInfo:
    """Describe the checkpoint `model`: a folder, an object-store prefix or a hub name.

    Reads config, preprocessor and the headers of the weights; the weights themselves only to hash them. `image_size`
    is in pixels, one number or (height, width); `label_file` names the classes.
    Raises SpecError for a label file that does not fit, CheckpointError if the model cannot be found or read, is of an
    unsupported family, or if tensors are missing, unexpected or of another shape.
    """
    if image_size is not None:
        image_size = _sides(image_size)
    place = resolve(model, revision, storage_options)
    weights = find_weights(place.folder)
    config, row, network, wanted = _planned(weights, place.name, beit_final_norm)
    if weights.kind == "npz":
        preprocessing = Preprocessing(resize=_sides(image_size or network.trained_size))
    else:
        preprocessing = read_preprocessing(weights.folder, image_size=image_size)
    file = None
    if label_file and network.num_labels:
        file = read_label_file(label_file, network.num_labels, storage_options)
    _require_whole_patches(preprocessing.output_size, network, place.name)
    problem = config.get("problem_type")
    with described_as(row.family, place.name):
        title = _architecture_name(config, row.family)
        labels = file.names if file else config_labels(config, network.num_labels, place.name)
    return ModelInfo(
        name=place.name,
        revision=place.revision,
        folder=str(place.folder),
        family=row.family,
        layout=row.layout,
        architecture=title,
        digest=digest_of(weights),
        labels=labels,
        # A softmax over one logit is 1 for every image; transformers takes the sigmoid as well.
        multi_label=problem == "multi_label_classification" or (network.num_labels == 1 and problem != "regression"),
        preprocessing=preprocessing,
        parameters=parameter_count(network),
        beit_final_norm=beit_final_norm,
        network=network,
        plan=wanted,
        label_digest=file.digest if file else None,
        regression=problem == "regression",
        zero_head=config.get("zero_head", 0),
    )


def _planned(weights: Weights, name: str, beit_final_norm: bool) -> tuple[Config, Format, Architecture, Plan]:
    """Config and format, the network, and how the tensors map to it."""
    with described_as("a model", name):
        config, shapes = _described(weights)
        config = {**config, "beit_final_norm": beit_final_norm}
        row, reason = recognise(config, shapes, name)
    if beit_final_norm and row.family != "beit":
        raise CheckpointError(f"{name}: --beit-final-norm is for BEiT checkpoints; {reason}")
    with described_as(row.family, name):
        network = row.architecture(config, shapes)
        require_depth(network.depth, shapes, name)
        wanted = plan(network, row.spell(network, shapes))
        check(wanted, shapes, row.ignored, f"{name}: taken for {row.family} in {row.layout} layout, as {reason}")
    # Who trained a classifier on such a tower in timm did so with the exact GELU.
    exact = row.layout == "timm" and network.activation == "gelu" and not network.num_labels
    if exact and timm.trained_with_quick_gelu(config):
        log.warning(
            "%s: trained with QuickGELU, but runs with the exact GELU, as in timm by this architecture's name, so that "
            'its vectors are not the original\'s; "model_args": {"act_layer": "quick_gelu"} in config.json makes '
            "them so",
            name,
        )
    return config, row, network, wanted


def require_classes(info: ModelInfo) -> None:
    """Raise SpecError for a head that gives quantities: a softmax or sigmoid of them would mean nothing."""
    if info.regression:
        raise SpecError(
            f"labels are asked for, but {info.name} was trained for regression (problem_type in its config.json): its "
            "head gives quantities, not scores. Use it for features alone, or a checkpoint trained to classify"
        )


def _described(weights: Weights) -> tuple[Config, Shapes]:
    """Config and shapes. An `.npz` has no config: its name and its arrays say what it is.

    Its pixels are resized to a square, bilinearly, and brought to −1 … 1, as google-research evaluates, but with
    Pillow's antialiasing, which timm and Hugging Face apply to these weights as well.
    """
    shapes = read_shapes(weights)
    if weights.kind != "npz":
        path = weights.folder / "config.json"
        if not path.is_file():
            raise CheckpointError(
                f"{path}: no such file. Put the one there that came with the weights. For tensors by timm's names (of "
                "timm's train.py, the first BEiT, DeiT, DINO and MAE) timm.models.save_for_hf writes one, or write "
                f"what holds for them, such as {timm.EXAMPLE_CONFIG}"
            )
        return timm.with_pretrained_cfg(read_json(path)), shapes
    normalised = {name: array.shape for name, array in npz_vit.normalise(stand_ins(shapes)).items()}
    config = {"raw_shapes": shapes, "file_name": weights.files[0].name}
    if not _has_zero_head(weights.files[0], shapes):
        return config, normalised
    kept = {name: shape for name, shape in normalised.items() if not name.startswith("head/")}
    return {**config, "zero_head": normalised["head/kernel"][0]}, kept


def _has_zero_head(path: Path, shapes: Shapes) -> bool:
    """Whether a classifier is there, but all zeros, as in what google-research published before it was fine-tuned
    (https://github.com/google-research/vision_transformer/issues/10). In a tower shared with text a head is none."""
    prefix = npz_vit.prefix_of(shapes)
    head = [f"{prefix}head/{name}" for name in ("bias", "kernel")]  # the small one first: a trained one's says enough
    return not prefix.endswith("img/") and all(name in shapes and is_all_zeros(path, name) for name in head)


def stand_ins(shapes: Shapes) -> "dict[str, np.ndarray[Any, Any]]":
    """Zeros of these shapes that take no memory."""
    import numpy as np

    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _architecture_name(config: Config, family: str) -> str:
    names = config.get("architectures") or [config.get("architecture") or family]
    return str(names[0])


def _require_whole_patches(size: tuple[int, int], a: Architecture, name: str) -> None:
    for side, patch in zip(size, a.patch_size, strict=True):
        if side % patch and size != a.trained_size:  # SigLIP's So400m/14 was trained at 384, of which 378 count
            low = side // patch * patch
            near = f"{low} or {low + patch}" if low else str(patch)
            raise CheckpointError(
                f"{name}: an image of {size[0]}×{size[1]} does not divide into patches of {a.patch_size[0]}×"
                f"{a.patch_size[1]} pixels; --image-size {near} does"
            )
    if a.network == "mixer" and a.grid(size) != a.trained_grid:
        raise CheckpointError(
            f"{name}: an MLP-Mixer's weights hold the number of its patches, so it runs at "
            f"{a.trained_size[0]}×{a.trained_size[1]} only; leave out --image-size"
        )


def digest_of(weights: Weights) -> str:
    """SHA-256 over the names and contents of config and weight files: 64 hexadecimal digits.

    Raises CheckpointError where the config is not there.
    """
    total = hashlib.sha256()
    config = [] if weights.kind == "npz" else [weights.folder / "config.json"]
    if not all(path.is_file() for path in config):
        raise CheckpointError(f"{config[0]}: no such file")
    for path in (*config, *weights.files):
        with path.open("rb") as file:
            one = hashlib.sha256()
            while chunk := file.read(HASH_CHUNK_BYTES):
                one.update(chunk)
        total.update(f"{path.name} {one.hexdigest()}\n".encode())
    return total.hexdigest()

"""How a checkpoint wants its pixels.

From the files of Hugging Face image processors, old and new (`processor_config.json` where that holds one, else
`preprocessor_config.json`), or from timm's `pretrained_cfg`. Old Hugging Face files say `feature_extractor_type` and
give sizes as one number; new ones say `image_processor_type` and give {height, width} or {shortest_edge}. What one
number means, and what holds where a key is absent, is set by the processor's class: the table below. Where no class is
named, it is the one of the model's type.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from pipeline.models.formats import timm
from pipeline.models.weights import read_json
from schemas.errors import CheckpointError
from schemas.preprocessing import Preprocessing

Size = tuple[int, int]
Reader = Callable[[Mapping[str, Any], Path], Preprocessing]

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BILINEAR, BICUBIC = 2, 3


class Processor(NamedTuple):
    """Defaults of an image processor class. `square`: a size given as one number is a square, not a shortest edge.
    `crops`: it crops unless told otherwise; `crop` to what size."""

    size: Any
    resample: int
    square: bool = True
    crop: int | None = None
    crops: bool = False
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF


PROCESSORS: Mapping[str, Processor] = {
    "ViT": Processor(size=224, resample=BILINEAR),
    "Beit": Processor(size=224, resample=BICUBIC, crop=224),
    "DeiT": Processor(size=256, resample=BICUBIC, crop=224, crops=True),
    "Bit": Processor({"shortest_edge": 224}, BICUBIC, False, crop=224, crops=True, mean=CLIP_MEAN, std=CLIP_STD),
    "CLIP": Processor({"shortest_edge": 224}, BICUBIC, False, crop=224, crops=True, mean=CLIP_MEAN, std=CLIP_STD),
    "Siglip": Processor({"height": 224, "width": 224}, BICUBIC, square=False),
}
# By the `model_type` of config.json, for files that name no class: those of the first ViT on the hub (160 bytes of
# google/vit-base-patch16-224) are older than the key. transformers 5.23 does the same (`IMAGE_PROCESSOR_MAPPING`).
USUAL_PROCESSORS: Mapping[str, str] = {
    "vit": "ViT",
    "vit_mae": "ViT",
    "vit_msn": "ViT",
    "deit": "DeiT",
    "beit": "Beit",
    "data2vec-vision": "Beit",
    "clip": "CLIP",
    "siglip": "Siglip",
    "dinov2": "Bit",
}
SUFFIXES = ("ImageProcessorFast", "ImageProcessorPil", "ImageProcessor", "FeatureExtractor")


def read_preprocessing(folder: str | Path, *, image_size: int | Size | None = None) -> Preprocessing:
    """Preprocessing of the checkpoint in `folder`; `image_size` (pixels, or height and width) overrides its size.

    With a centre crop, the resize before it grows in proportion. Raises CheckpointError if the file is absent, of an
    unknown processor, or does not lead to images of one fixed size: nothing is ever assumed.
    """
    path = Path(folder) / "preprocessor_config.json"
    config_path = Path(folder) / "config.json"
    config = {} if path.is_file() or not config_path.is_file() else read_json(config_path)
    if "pretrained_cfg" in timm.with_pretrained_cfg(config):
        return _read(config_path, partial(_from_timm, image_size=image_size), None)
    # transformers 5 saves this for images and texts in one, leaves an older file beside it, and reads that one last.
    together = path.with_name("processor_config.json")
    if together.is_file() and isinstance(read_json(together).get("image_processor"), dict):
        return _read(together, lambda found, where: _from_processor(found["image_processor"], where), image_size)
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: has no preprocessor_config.json, so how to resize and normalise images is unknown. Copy the "
            "one of the original checkpoint there; for google's ViT it says "
            '{"image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}, "resample": 2, '
            '"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
        )
    return _read(path, _from_processor, image_size)


def _read(path: Path, reader: Reader, image_size: int | Size | None) -> Preprocessing:
    try:
        return resized(reader(read_json(path), path), image_size, path)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise CheckpointError(f"{path}: {key}: {problem['msg']} (given: {problem['input']!r})") from error


def _from_processor(config: Mapping[str, Any], path: Path) -> Preprocessing:
    defaults = _defaults(config, path)
    resize, shortest_edge = None, None
    if config.get("do_resize", True):
        resize, shortest_edge = _size(config.get("size", defaults.size), defaults.square, path)
    crop = None
    if config.get("do_center_crop", defaults.crops):
        side = config.get("crop_size", defaults.crop)
        if side is None:
            raise CheckpointError(
                f"{path}: do_center_crop is true, but there is no crop_size; add it, such as "
                '"crop_size": {"height": 224, "width": 224}, or set do_center_crop to false'
            )
        crop, _ = _size(side, True, path)
        if crop is None:
            raise CheckpointError(f"{path}: crop_size {config.get('crop_size')!r} is no height and width")
    rescale = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    normalise = config.get("do_normalize", True)
    std = _channels(config.get("image_std", defaults.std)) if normalise else (1.0, 1.0, 1.0)
    if isinstance(std, list | tuple) and 0 in std:
        raise CheckpointError(f"{path}: image_std {list(std)} divides by zero")
    return Preprocessing(
        resize=resize,
        shortest_edge=shortest_edge,
        resample=config.get("resample", defaults.resample),
        crop=crop,
        rescale_factor=rescale,
        mean=_channels(config.get("image_mean", defaults.mean)) if normalise else (0.0, 0.0, 0.0),
        std=std,
    )


TIMM_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def _from_timm(config: Mapping[str, Any], path: Path, image_size: int | Size | None = None) -> Preprocessing:
    """timm's evaluation transform: resize to size / crop_pct, then crop the centre.

    `crop_mode` center keeps the aspect ratio, squash does not. `image_size` takes the place of the size given.
    """
    config = timm.with_pretrained_cfg(config)
    given = config["pretrained_cfg"] or {}
    absent = [key for key in ("input_size", "interpolation", "mean", "std") if given.get(key) is None]
    if absent:
        raise CheckpointError(
            f"{path}: pretrained_cfg lacks {', '.join(absent)}; take them from the config.json of the checkpoint that "
            "this one was trained from"
        )
    mode, filter_name = given.get("crop_mode") or "center", given["interpolation"]
    if mode not in ("center", "squash") or filter_name not in TIMM_FILTERS:
        raise CheckpointError(f"{path}: crop_mode {mode!r} with interpolation {filter_name!r} is not supported")
    height, width = timm.input_size(config) if image_size is None else _pair(image_size)
    share = given.get("crop_pct") or 0.875
    scaled = (int(height / share), int(width / share))
    keep = mode == "center"
    return Preprocessing(
        resize=None if keep else scaled,
        shortest_edge=scaled[0] if keep and scaled[0] == scaled[1] else None,
        cover=scaled if keep and scaled[0] != scaled[1] else None,
        resample=TIMM_FILTERS[filter_name],
        crop=(height, width),
        crop_rounding="even",
        mean=given["mean"],
        std=given["std"],
    )


def _defaults(config: Mapping[str, Any], path: Path) -> Processor:
    given = config.get("image_processor_type") or config.get("feature_extractor_type")
    name = str(given or _usual_processor(path.with_name("config.json")))
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    if name not in PROCESSORS:
        known = ", ".join(f"{each}ImageProcessor" for each in PROCESSORS)
        raise CheckpointError(
            f"{path}: image_processor_type is {name or 'absent'!r}; known are {known}. Set the one that is meant"
        )
    return PROCESSORS[name]


def _usual_processor(config_path: Path) -> str:
    if not config_path.is_file():
        return ""
    return USUAL_PROCESSORS.get(str(read_json(config_path).get("model_type")), "")


def _channels(value: Any) -> Any:
    return (value, value, value) if isinstance(value, int | float) else value


def _size(value: Any, square: bool, path: Path) -> tuple[Size | None, int | None]:
    """(height, width) or a shortest edge, whichever `value` gives."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return ((value, value), None) if square else (None, value)
    if isinstance(value, list) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    if isinstance(value, dict) and {"height", "width"} <= value.keys():
        return (value["height"], value["width"]), None
    if isinstance(value, dict) and set(value) == {"shortest_edge"}:
        return None, value["shortest_edge"]
    raise CheckpointError(f"{path}: size {value!r} is neither a number, {{height, width}} nor {{shortest_edge}}")


def resized(p: Preprocessing, image_size: int | Size | None, where: Path) -> Preprocessing:
    """`p` with another output size. Raises CheckpointError if the images would not all come out at one size.

    A shortest edge before a crop that is not square becomes a size to cover, in the same proportion to the crop:
    otherwise upright pictures would not fill a broad crop.
    """
    if image_size is None:
        if p.crop is None and p.resize is None:
            raise CheckpointError(
                f"{where}: gives no fixed size (it neither crops nor resizes to height and width); "
                "say which with --image-size"
            )
        return p
    new = _pair(image_size)
    if p.crop is None:
        return p.model_copy(update={"resize": new, "shortest_edge": None})
    old = p.crop
    grown = tuple(side * to // of for side, to, of in zip(p.resize, new, old, strict=True)) if p.resize else None
    edge, cover = None, None
    if p.shortest_edge and new[0] == new[1]:
        edge = p.shortest_edge * new[0] // min(old)
    elif p.shortest_edge:
        cover = tuple(p.shortest_edge * side // min(old) for side in new)
    return p.model_copy(update={"crop": new, "resize": grown, "shortest_edge": edge, "cover": cover})


def _pair(size: int | Size) -> Size:
    return (size, size) if isinstance(size, int) else (size[0], size[1])

"""timm's evaluation transform, bit for bit: its resize, its crop, and where it rounds an odd margin."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import checkpoints  # noqa: F401  lets torchvision be imported
from support.testdata import needs_testdata, photos

from pipeline.images.decode import DecodeSpec, decode_into
from pipeline.images.formats import prepare_process
from pipeline.images.transform import resize_and_crop
from pipeline.models import read_preprocessing
from schemas.preprocessing import Preprocessing


def published(folder: Path, crop_mode: str, crop_pct: float, size: tuple[int, int]) -> Preprocessing:
    config = {"input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": crop_pct, "crop_mode": crop_mode}
    config |= {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (folder / "config.json").write_text(json.dumps({"architecture": "x", "pretrained_cfg": config}))
    return read_preprocessing(folder, image_size=size)


@needs_testdata
@pytest.mark.parametrize("size", [(224, 224), (224, 320), (320, 224)])
@pytest.mark.parametrize(("crop_mode", "crop_pct"), [("center", 0.9), ("center", 0.875), ("squash", 0.95)])
def test_photographs_from_bytes(tmp_path: Path, crop_mode: str, crop_pct: float, size: tuple[int, int]) -> None:
    from timm.data.transforms_factory import transforms_imagenet_eval

    prepare_process()
    transform = transforms_imagenet_eval(size, crop_pct=crop_pct, crop_mode=crop_mode, interpolation="bicubic")
    resize, crop = transform.transforms[:2]
    ours = published(tmp_path, crop_mode, crop_pct, size)
    for path in photos(12):
        with Image.open(path) as image:
            scaled = resize(image.convert("RGB"))
        out = np.empty((*size, 3), np.uint8)
        decode_into(path.read_bytes(), out, DecodeSpec(ours, "exact", 1 << 30))
        np.testing.assert_array_equal(out, np.asarray(crop(scaled)), err_msg=path.name)


@pytest.mark.parametrize("spare", range(9))
def test_odd_margins_round_as_in_torchvision(spare: int) -> None:
    """With 3 or 7 pixels to spare timm and Hugging Face cut differently."""
    from torchvision.transforms import CenterCrop

    noise = np.random.default_rng(spare).integers(0, 256, (32, 32 + spare, 3), np.uint8)
    theirs = np.asarray(CenterCrop((32, 32))(Image.fromarray(noise)))
    cuts = {}
    for rounding in ("down", "even"):
        cuts[rounding] = np.empty((32, 32, 3), np.uint8)
        preprocessing = Preprocessing(crop=(32, 32), crop_rounding=rounding)
        size = (32 + spare, 32)
        resize_and_crop(Image.fromarray(noise), (0, 0, *size), size, preprocessing, cuts[rounding])
    np.testing.assert_array_equal(cuts["even"], theirs)
    assert (cuts["down"] == theirs).all() == (spare % 4 != 3)

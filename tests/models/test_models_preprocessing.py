"""preprocessor_config.json, old and new: each way of saying size, crop, rescale and normalise."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from support import checkpoints  # noqa: F401  (declares what transformers' image processors need)

from pipeline.images.transform import resized_size
from pipeline.models import read_preprocessing
from pipeline.models.preprocessing import USUAL_PROCESSORS
from schemas.errors import CheckpointError
from schemas.preprocessing import Preprocessing

VIT = {"image_processor_type": "ViTImageProcessor"}
QUARTER = (0.25, 0.25, 0.25)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def write(folder: Path, **values: Any) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (VIT, Preprocessing(resize=(224, 224))),
        ({"feature_extractor_type": "ViTFeatureExtractor", "size": 384}, Preprocessing(resize=(384, 384))),
        ({**VIT, "size": {"height": 96, "width": 160}}, Preprocessing(resize=(96, 160))),
        ({**VIT, "do_normalize": False}, Preprocessing(resize=(224, 224), mean=(0, 0, 0), std=(1, 1, 1))),
        ({**VIT, "do_rescale": False}, Preprocessing(resize=(224, 224), rescale_factor=1)),
        ({**VIT, "rescale_factor": 0.5}, Preprocessing(resize=(224, 224), rescale_factor=0.5)),
        (
            {**VIT, "image_mean": 0.25, "image_std": [1, 2, 3]},
            Preprocessing(resize=(224, 224), mean=QUARTER, std=(1, 2, 3)),
        ),
        ({**VIT, "do_resize": False, "do_center_crop": True, "crop_size": 64}, Preprocessing(crop=(64, 64))),
        (
            {"image_processor_type": "BeitImageProcessor", "size": 256, "crop_size": 224, "do_center_crop": True},
            Preprocessing(resize=(256, 256), crop=(224, 224), resample=3),
        ),
        (
            {"feature_extractor_type": "BeitFeatureExtractor", "size": 224, "do_center_crop": False, "resample": 2},
            Preprocessing(resize=(224, 224), resample=2),
        ),
        (
            {"feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224},
            Preprocessing(resize=(256, 256), crop=(224, 224), resample=3),
        ),
        (
            {"image_processor_type": "CLIPImageProcessorFast", "size": 336, "crop_size": {"height": 336, "width": 336}},
            Preprocessing(shortest_edge=336, crop=(336, 336), resample=3, mean=CLIP_MEAN, std=CLIP_STD),
        ),
        (
            {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "resample": 3},
            Preprocessing(shortest_edge=256, crop=(224, 224), resample=3, mean=CLIP_MEAN, std=CLIP_STD),
        ),
    ],
)
def test_read(tmp_path: Path, values: dict[str, Any], expected: Preprocessing) -> None:
    assert read_preprocessing(write(tmp_path, **values)) == expected


@pytest.mark.parametrize("name", ["ViT", "Beit", "DeiT", "CLIP", "Bit", "Siglip"])
@pytest.mark.parametrize("values", [{}, {"size": 256}, {"size": {"shortest_edge": 200}, "crop_size": 96}])
def test_silent_keys_mean_what_the_library_means(tmp_path: Path, name: str, values: dict[str, Any]) -> None:
    """An image comes out at the size and with the values that transformers gives for the same file."""
    folder = write(tmp_path, image_processor_type=f"{name}ImageProcessor", **values)
    ours = None
    with contextlib.suppress(CheckpointError):
        ours = read_preprocessing(folder)
    processor = getattr(transformers, f"{name}ImageProcessorPil").from_pretrained(folder)
    image = Image.fromarray(np.full((300, 400, 3), 200, dtype=np.uint8))
    theirs = processor(image, return_tensors="np")["pixel_values"][0]
    if ours is None:
        assert theirs.shape[1] != theirs.shape[2]
        return
    assert theirs.shape[1:] == ours.output_size
    expected = (200 * ours.rescale_factor - np.array(ours.mean)) / np.array(ours.std)
    np.testing.assert_allclose(theirs[:, 48, 48], expected, atol=1e-6)
    assert ours.resample == int(processor.resample)


NULLS = ("size", "do_resize", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize", "resample")


@pytest.mark.parametrize("name", ["ViT", "Beit", "DeiT", "CLIP", "Bit", "Siglip"])
@pytest.mark.parametrize("values", [{"do_center_crop": True}, *({key: None} for key in NULLS)], ids=str)
def test_what_the_library_refuses_is_refused_and_a_null_is_what_it_takes_it_for(
    tmp_path: Path, name: str, values: dict[str, Any]
) -> None:
    folder = write(tmp_path, image_processor_type=f"{name}ImageProcessor", **values)
    processor = getattr(transformers, f"{name}ImageProcessorPil").from_pretrained(folder)
    image = Image.fromarray(np.full((300, 400, 3), 200, dtype=np.uint8))
    try:
        theirs = processor(image, return_tensors="np")["pixel_values"][0]
    except ValueError:
        theirs = None
    if theirs is None or theirs.shape[1] != theirs.shape[2]:
        with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: "):
            read_preprocessing(folder)
        return
    ours = read_preprocessing(folder)
    assert theirs.shape[1:] == ours.output_size
    expected = (200 * ours.rescale_factor - np.array(ours.mean)) / np.array(ours.std)
    np.testing.assert_allclose(theirs[:, 48, 48], expected, rtol=1e-6)


def test_another_image_size(tmp_path: Path) -> None:
    write(tmp_path, **VIT)
    assert read_preprocessing(tmp_path, image_size=384).resize == (384, 384)
    assert read_preprocessing(tmp_path, image_size=(96, 160)).resize == (96, 160)
    write(tmp_path, image_processor_type="DeiTImageProcessor")
    bigger = read_preprocessing(tmp_path, image_size=448)
    assert (bigger.resize, bigger.crop) == ((512, 512), (448, 448))
    write(tmp_path, image_processor_type="CLIPImageProcessor", size={"shortest_edge": 256}, crop_size=224)
    bigger = read_preprocessing(tmp_path, image_size=448)
    assert (bigger.shortest_edge, bigger.crop) == (512, (448, 448))
    broad = read_preprocessing(tmp_path, image_size=(224, 336))
    assert (broad.shortest_edge, broad.cover, broad.crop) == (None, (256, 384), (224, 336))


@pytest.mark.parametrize("size", [(224, 320), (320, 224), (384, 384)])
@pytest.mark.parametrize("crop_pct", [0.9, 0.875, 1.0])
def test_timm_resizes_another_size_alike(tmp_path: Path, size: tuple[int, int], crop_pct: float) -> None:
    """Upright and broad pictures get the size that timm's own transform gives them before its crop."""
    from timm.data.transforms_factory import transforms_imagenet_eval

    published = {"input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": crop_pct}
    published |= {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "x", "pretrained_cfg": published}))
    ours = read_preprocessing(tmp_path, image_size=size)
    resize = transforms_imagenet_eval(size, crop_pct=crop_pct, interpolation="bicubic").transforms[0]
    for picture in ((640, 427), (427, 640), (500, 500), (3000, 171)):
        theirs = resize(Image.new("RGB", picture)).size
        assert resized_size(*picture, ours) == theirs
    assert ours.output_size == size


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"image_processor_type": "OwlImageProcessor"}, "image_processor_type is 'Owl'"),
        ({}, "image_processor_type is 'absent'"),
        ({**VIT, "size": {"longest_edge": 512}}, "size {'longest_edge': 512} is neither"),
        ({**VIT, "size": {"shortest_edge": 256}}, "gives no fixed size"),
        ({**VIT, "do_resize": False}, "--image-size"),
        ({**VIT, "resample": 9}, "resample"),
        ({**VIT, "image_mean": [0.5, 0.5]}, "mean"),
        ({**VIT, "rescale_factor": -1}, "rescale_factor"),
        ({**VIT, "image_std": [0.5, 0.0, 0.5]}, "image_std"),
        ({**VIT, "do_center_crop": True}, "do_center_crop is true, but there is no crop_size; add it"),
    ],
)
def test_refused(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json") as caught:
        read_preprocessing(write(tmp_path, **values))
    assert said in str(caught.value)


# All that stands in preprocessor_config.json of google/vit-base-patch16-224.
OLDEST = {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 224}


@pytest.mark.parametrize("values", [OLDEST, {}])
@pytest.mark.parametrize(
    "config",
    [transformers.ViTConfig, transformers.ViTMAEConfig, transformers.ViTMSNConfig, transformers.DeiTConfig,
     transformers.BeitConfig, transformers.Data2VecVisionConfig, transformers.CLIPConfig, transformers.SiglipConfig,
     transformers.Dinov2Config],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_a_file_that_names_no_processor_is_of_the_usual_one(
    tmp_path: Path, config: type[transformers.PretrainedConfig], values: dict[str, Any]
) -> None:
    if config is transformers.SiglipConfig:  # which takes one number for a shortest edge, and crops nothing
        values = {key: value for key, value in values.items() if key != "size"}
    config().save_pretrained(tmp_path)
    write(tmp_path, **values)
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    found = read_preprocessing(tmp_path)
    assert type(theirs).__name__.startswith(USUAL_PROCESSORS[config.model_type])
    theirs.save_pretrained(tmp_path / "saved")
    assert found == read_preprocessing(tmp_path / "saved")
    if config is transformers.ViTConfig and values:
        assert (found.resize, found.resample, found.mean) == ((224, 224), 2, (0.5, 0.5, 0.5))


def test_a_processor_of_images_and_texts_in_one_file(tmp_path: Path) -> None:
    """As transformers 5 saves them."""
    processor = transformers.SiglipImageProcessorPil(size={"height": 64, "width": 64})
    processor.save_pretrained(tmp_path)
    expected = read_preprocessing(tmp_path)
    single = tmp_path / "preprocessor_config.json"
    both = {"image_processor": json.loads(single.read_text()), "processor_class": "SiglipProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(both))
    single.unlink()
    assert read_preprocessing(tmp_path) == expected
    assert read_preprocessing(tmp_path, image_size=32).output_size == (32, 32)


def test_an_older_file_beside_what_was_saved_last_is_not_read(tmp_path: Path) -> None:
    """transformers 5 leaves it there, and itself takes what is in `processor_config.json`."""
    transformers.SiglipImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(tmp_path)
    fine = transformers.SiglipImageProcessorPil(size={"height": 384, "width": 320}, image_mean=QUARTER)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({"image_processor": fine.to_dict(), "processor_class": "SiglipProcessor"}))
    theirs = transformers.SiglipImageProcessorPil.from_pretrained(tmp_path)
    ours = read_preprocessing(tmp_path)
    assert ours.output_size == (theirs.size["height"], theirs.size["width"]) == (384, 320)
    assert ours.mean == tuple(theirs.image_mean) == QUARTER
    path.write_text(json.dumps({"processor_class": "SiglipProcessor"}))
    assert read_preprocessing(tmp_path).output_size == (224, 224)


def test_never_assumed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config.json.*ViTImageProcessor"):
        read_preprocessing(tmp_path)

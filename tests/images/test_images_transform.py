"""Resize and crop equal the reference image processors, bit for bit."""

import numpy as np
import pytest
from PIL import Image
from support import checkpoints  # noqa: F401  lets transformers be imported
from support.testdata import needs_testdata, photos, public_domain_photos
from transformers import BeitImageProcessorPil, DeiTImageProcessorPil, ViTImageProcessorPil

from pipeline.images.decode import DecodeSpec, decode_into
from pipeline.images.formats import prepare_process
from pipeline.images.transform import resize_and_crop, resized_size
from schemas.preprocessing import Preprocessing

PROCESSORS = {"vit": ViTImageProcessorPil, "beit": BeitImageProcessorPil, "deit": DeiTImageProcessorPil}


def reference(processor, image):
    """The uint8 H×W×3 that a processor has before it rescales and normalises."""
    batch = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
    return batch["pixel_values"][0].transpose(1, 2, 0).astype(np.uint8)


def ours(image, preprocessing):
    out = np.full((*preprocessing.output_size, 3), 77, np.uint8)
    resize_and_crop(image, (0, 0, *image.size), resized_size(*image.size, preprocessing), preprocessing, out)
    return out


def picture(width, height):
    noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


SIZES = [(500, 375), (375, 500), (224, 224), (225, 223), (1, 1), (3, 200), (640, 31), (97, 1021), (448, 448)]


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("resample", range(6))
def test_resize_equals_the_reference_with_every_filter(name, resample):
    processor = PROCESSORS[name](size={"height": 224, "width": 200}, resample=resample, do_center_crop=False)
    preprocessing = Preprocessing(resize=(224, 200), resample=resample)
    for size in SIZES:
        image = picture(*size)
        np.testing.assert_array_equal(ours(image, preprocessing), reference(processor, image), err_msg=str(size))


@pytest.mark.parametrize("resample", range(6))
@pytest.mark.parametrize(("edge", "crop"), [(256, (224, 224)), (224, (224, 224)), (257, (223, 225)), (65, (64, 33))])
def test_shortest_edge_and_crop_equal_the_reference(edge, crop, resample):
    processor = DeiTImageProcessorPil(
        size={"shortest_edge": edge}, crop_size={"height": crop[0], "width": crop[1]}, resample=resample
    )
    preprocessing = Preprocessing(shortest_edge=edge, crop=crop, resample=resample)
    for size in SIZES:
        image = picture(*size)
        np.testing.assert_array_equal(ours(image, preprocessing), reference(processor, image), err_msg=str(size))


@pytest.mark.parametrize(
    ("size", "crop"), [((256, 256), (224, 224)), ((100, 101), (224, 223)), ((300, 90), (131, 224))]
)
def test_crop_after_a_fixed_resize_pads_and_cuts_like_the_reference(size, crop):
    processor = DeiTImageProcessorPil(
        size={"height": size[0], "width": size[1]}, crop_size={"height": crop[0], "width": crop[1]}
    )
    preprocessing = Preprocessing(resize=size, crop=crop, resample=3)
    for shape in SIZES:
        image = picture(*shape)
        np.testing.assert_array_equal(ours(image, preprocessing), reference(processor, image), err_msg=str(shape))


@pytest.mark.parametrize("shape", SIZES)
def test_crop_without_resize_equals_the_reference(shape):
    processor = DeiTImageProcessorPil(do_resize=False, crop_size={"height": 224, "width": 224})
    image = picture(*shape)
    np.testing.assert_array_equal(ours(image, Preprocessing(crop=(224, 224))), reference(processor, image))


def test_a_very_long_strip_is_cropped_without_its_full_size():
    strip = Image.new("RGB", (60_000, 4), (200, 30, 30))
    strip.paste((10, 220, 10), (29_990, 0, 30_010, 4))
    out = ours(strip, Preprocessing(shortest_edge=256, crop=(224, 224), resample=2))
    assert out.shape == (224, 224, 3)
    np.testing.assert_array_equal(out[:, 112], np.broadcast_to([10, 220, 10], (224, 3)))


def test_the_window_of_a_strip_is_where_the_crop_of_the_whole_would_be(monkeypatch):
    preprocessing = Preprocessing(shortest_edge=96, crop=(64, 64), resample=3)
    image = picture(900, 130).resize((700, 101), 3)
    whole = ours(image, preprocessing).astype(int)
    monkeypatch.setattr("pipeline.images.transform.MAX_INTERMEDIATE_PIXELS", 1)
    assert np.abs(ours(image, preprocessing).astype(int) - whole).max() <= 3


@needs_testdata
@pytest.mark.parametrize("name", PROCESSORS)
def test_photographs_from_bytes_equal_pillow_and_the_reference(name):
    """Through simplejpeg, straight into the buffer, against Pillow and the processor with its own defaults."""
    prepare_process()
    processor = PROCESSORS[name]()
    size = (processor.size["height"], processor.size["width"])
    crop = (224, 224) if processor.do_center_crop else None
    preprocessing = Preprocessing(resize=size, crop=crop, resample=int(processor.resample))
    spec = DecodeSpec(preprocessing, "exact", 100_000_000)
    out = np.empty((*preprocessing.output_size, 3), np.uint8)
    files = (
        photos()[:: 2 if name == "vit" else 20]
        + [path for path in public_domain_photos() if path.suffix == ".jpg"][2:4]
    )
    for path in files:
        decode_into(path.read_bytes(), out, spec)
        with Image.open(path) as image:
            expected = reference(processor, image.convert("RGB"))
        np.testing.assert_array_equal(out, expected, err_msg=path.name)

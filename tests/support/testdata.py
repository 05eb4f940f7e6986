"""Photographs, odd images and a trained model that are not part of the project; what needs them is skipped without."""

import os
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).resolve().parents[2]
TESTDATA = Path(os.environ.get("PATCHSTREAM_TESTDATA", _REPOSITORY.parent / "shared" / "testdata")).resolve()

needs_testdata = pytest.mark.skipif(
    not TESTDATA.is_dir(), reason=f"no test data at {TESTDATA}; PATCHSTREAM_TESTDATA says where"
)


def photos(count: int | None = None) -> list[Path]:
    """JPEG photographs (200), by name; the first `count` of them. The name begins with the ImageNet wnid."""
    return _files("photos", "*.JPEG")[:count]


def public_domain_photos() -> list[Path]:
    """Large photographs (27) as jpg, png, webp, avif and heic."""
    return _files("photos-public-domain")


def fuzzed_images() -> list[Path]:
    """Fuzz inputs of six formats, most without an extension; about a quarter decode."""
    return _files("odd-images/go-fuzz-corpus", "*/corpus/*")


def rotated_images() -> list[Path]:
    """The same two photographs in each EXIF orientation."""
    return _files("odd-images/exif-orientation-examples", "*.jpg")


def trained_vit() -> Path:
    """A ViT-Ti/16 trained on ImageNet-1k, in Hugging Face layout."""
    return TESTDATA / "models" / "vit-tiny-patch16-224"


def _files(folder: str, pattern: str = "*") -> list[Path]:
    return sorted(path for path in (TESTDATA / folder).glob(pattern) if path.is_file())

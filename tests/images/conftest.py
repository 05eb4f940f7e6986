"""Decoding sets Pillow's own limit, which is one for the whole process: each test leaves it as it was."""

import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _limit_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)

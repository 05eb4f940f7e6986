"""The set-up of a process that decodes."""

import functools
import logging
import warnings

from PIL import Image, ImageFile

from pipeline.picture_formats import register_heif


@functools.cache
def _register_once() -> None:
    register_heif()
    Image.init()


def prepare_process() -> None:
    """Register HEIC and make Pillow strict and silent. Cheap to call again.

    Its warnings are silenced because a worker's log is no place for what belongs into a row.
    """
    _register_once()
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    warnings.filterwarnings("ignore", module=r"(PIL|pi_heif)\b")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)

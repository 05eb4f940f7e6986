"""Which decoders may open a file, and their set-up for a process."""

import functools
import logging
import warnings

import pi_heif
from PIL import Image, ImageFile

# Left out on purpose: EPS starts Ghostscript; IPTC opens what it wraps with any plugin, EPS included; WMF, BUFR,
# GRIB, HDF5 and MPEG only identify a file and cannot decode it; FPX and MIC need a package that is not installed.
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "TIFF",
    "BMP",
    "HEIF",
    "AVIF",
    "JPEG2000",
    "PPM",
    "ICO",
    "ICNS",
    "PSD",
    "TGA",
    "DDS",
    "QOI",
    "BLP",
    "CUR",
    "DCX",
    "DIB",
    "FITS",
    "FLI",
    "FTEX",
    "GBR",
    "IM",
    "IMT",
    "MCIDAS",
    "MSP",
    "PCD",
    "PCX",
    "PIXAR",
    "SGI",
    "SPIDER",
    "SUN",
    "XBM",
    "XPM",
    "XVTHUMB",
)


@functools.cache
def _register_once() -> None:
    pi_heif.register_heif_opener(thumbnails=False)
    Image.init()


def prepare_process() -> None:
    """Register HEIC and make Pillow strict and silent. Cheap to call again.

    Its warnings are silenced because a worker's log is no place for what belongs into a row.
    """
    _register_once()
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    warnings.filterwarnings("ignore", module=r"(PIL|pi_heif)\b")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)

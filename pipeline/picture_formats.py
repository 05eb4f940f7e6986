"""Which decoders may open a file, whether for the model or to be looked at."""

import functools

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
def register_heif() -> None:
    """Let Pillow open HEIC. Cheap to call again."""
    import pi_heif  # here, because whoever opens no file need not wait for it

    pi_heif.register_heif_opener(thumbnails=False)

"""Why an image could not be decoded, in words that a row of `failures/` can carry."""

import re

from PIL import Image

from pipeline.images.limits import DecodeTimeoutError
from schemas.errors import ImageError

_KINDS = (
    (b"%!PS", "PostScript, which is not decoded: it would start an external program"),
    (b"\xc5\xd0\xd3\xc6", "EPS, which is not decoded: it would start an external program"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "gzip-compressed data"),
    (b"BZh", "bzip2-compressed data"),
    (b"\xfd7zXZ", "xz-compressed data"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed data"),
    (b"PAR1", "a Parquet file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (b"\x00\x00\x01\xba", "an MPEG video"),
    (b"\x00\x00\x01\xb3", "an MPEG video"),
    (b"\xd7\xcd\xc6\x9a", "a Windows metafile, which is not decoded"),
    (b"version https://git-lfs", "a Git LFS pointer instead of the file"),
    (b"GRIB", "GRIB weather data"),
    (b"BUFR", "BUFR weather data"),
)
_DAMAGED = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG", "PNG"),
    (b"GIF8", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"BM", "BMP"),
    (b"\x00\x00\x00\x0cjP", "JPEG 2000"),
)
# The brands of ISO media files that Pillow and pi_heif take for pictures.
_BRANDS = frozenset(b"heic heix heim heis hevc hevx hevm hevs avif avis mif1 msf1".split())
_JPEG_XL = (b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")
_DAMAGE = "damaged or cut short"
# Of a TIFF that is whole, but whose pixels it has no mode for, Pillow says no more than of a damaged one.
_DAMAGE_OF_TIFF = (
    "damaged, cut short, or of a kind of pixels that is not decoded, such as floats in colour, 64 bits or many bands"
)
_TRUNCATED_WORDS = ("truncat", "premature", "unexpected end", "not enough image data", "end of file", "eof")


def bare(error: ImageError) -> ImageError:
    """`error` without its traceback and causes, whose frames would keep the file's bytes alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def not_an_image(data: bytes) -> ImageError:
    """No decoder recognises `data`: say what it looks like instead."""
    if not data:
        return ImageError("decode", "NotAnImage", "the file is empty (0 bytes)")
    name = _damaged_kind(data)
    if name:
        why = _DAMAGE_OF_TIFF if name == "TIFF" else _DAMAGE
        message = f"starts like a {name} but its header cannot be read: {why} ({len(data):,} bytes)"
        return ImageError("decode", "Corrupt", message)
    return ImageError("decode", "NotAnImage", f"{_likely_kind(data)}; first bytes: {data[:16].hex(' ')}")


def is_heic_or_avif(data: bytes) -> bool:
    """Whether `data` says that it is one. A video is of the same family of files."""
    return data[4:8] == b"ftyp" and data[8:12] in _BRANDS


def _damaged_kind(data: bytes) -> str | None:
    if is_heic_or_avif(data):
        return "HEIC or AVIF"
    return next((name for magic, name in _DAMAGED if data.startswith(magic)), None)


def _likely_kind(data: bytes) -> str:
    for magic, kind in _KINDS:
        if data.startswith(magic):
            return f"not an image but {kind}"
    if data.startswith(_JPEG_XL):
        return "JPEG XL, which is not decoded"
    head = data[:1024].lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "not an image but an HTML page (an error or log-in page under the image's address?)"
    if b"<svg" in head:
        return "SVG, a vector drawing, which is not decoded"
    if head.startswith(b"<?xml"):
        return "not an image but an XML document (an error message of the store?)"
    if head.startswith((b"{", b"[")):
        return "not an image but probably JSON"
    if data[4:8] == b"ftyp":
        return f"an ISO media file of brand {data[8:12]!r}, which no image decoder here reads (a video?)"
    if data[257:262] == b"ustar":
        return "not an image but a tar archive (a .tar among the failures is one that cannot be listed to its end)"
    if not any(data[:256]):
        return "not an image but zeros"
    return "no known image format"


def truncated(detail: str) -> ImageError:
    """The picture is cut short; what there is of it is not used."""
    return ImageError("decode", "Truncated", f"the picture ends early: {detail}")


def too_many_pixels(detail: str) -> ImageError:
    """The header promises more than `fetch.max_pixels`."""
    return ImageError("decode", "TooManyPixels", f"{detail} (fetch.max_pixels)")


def decode_failure(error: Exception, data: bytes) -> ImageError:
    """The row for an exception that a decoder raised on `data`."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, Image.DecompressionBombError):
        return too_many_pixels(re.sub(r".*?(\d+) pixels.*", r"\1 pixels", text))
    if isinstance(error, DecodeTimeoutError):
        message = f"decoding {len(data):,} bytes took longer than the time limit and was interrupted"
        return ImageError("decode", "DecodeTimedOut", message)
    if isinstance(error, MemoryError):
        message = f"out of memory while decoding {len(data):,} bytes {text}".rstrip()
        return ImageError("decode", "OutOfMemory", message, retryable=True)
    if isinstance(error, EOFError) or any(word in text.lower() for word in _TRUNCATED_WORDS):
        return truncated(text or "end of file")
    return ImageError("decode", "Corrupt", f"cannot be decoded: {type(error).__name__}: {text}")

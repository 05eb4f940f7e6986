"""Hostile and broken image files, made by code: name → bytes."""

import io
import random
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

SHORT, LONG = 3, 4


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_file(width: int, height: int, body: bytes, *chunks: bytes, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG with a header of our choice. `body` is the compressed content of IDAT."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pieces = [png_chunk(b"IHDR", header), *chunks, png_chunk(b"IDAT", body), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


def zeros(nbytes: int) -> bytes:
    """So many zeros, compressed by zlib, without ever holding them."""
    packer = zlib.compressobj(1)
    pieces = [packer.compress(bytes(1 << 20)) for _ in range(nbytes >> 20)]
    pieces.append(packer.compress(bytes(nbytes & 0xFFFFF)))
    return b"".join(pieces) + packer.flush()


def tiff_file(*tags: tuple[int, int, int, int]) -> bytes:
    """A little-endian TIFF whose directory holds `tags`: (tag, type, count, value)."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\x00\x08\x00\x00\x00" + struct.pack("<H", len(tags)) + entries + bytes(4) + bytes(64)


def tiled_tiff(side: int, *others: int) -> bytes:
    """A TIFF of 16 × 16 pixels in one deflated tile of `side` × `side`; `others` are further sides by the same tags."""
    body = zeros(side * side)
    tags = [(256, LONG, 1, 16), (257, LONG, 1, 16), (258, SHORT, 1, 8), (259, SHORT, 1, 8), (262, SHORT, 1, 1)]
    tags += [(277, SHORT, 1, 1), *((tag, LONG, 1, given) for tag in (322, 323) for given in (side, *others))]
    tags += [(325, LONG, 1, len(body))]
    entries = [struct.pack("<HHII", *tag) for tag in tags]
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries[-1:] = [struct.pack("<HHII", 324, LONG, 1, start), entries[-1]]
    return b"II*\x00\x08\x00\x00\x00" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4) + body


def icon(inner: bytes, side: int = 0) -> bytes:
    """An ICO that holds one file and says that it is `side` pixels wide (0: 256)."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, side, side, 0, 0, 1, 32, len(inner), 22) + inner


def apple_icon(inner: bytes) -> bytes:
    """An ICNS that holds one file as its 1024 × 1024 picture."""
    return b"icns" + struct.pack(">I", 16 + len(inner)) + b"ic10" + struct.pack(">I", 8 + len(inner)) + inner


def saved(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def _webp_of_size(width: int, height: int) -> bytes:
    """A lossless WebP whose header (14 bits for each side) is patched."""
    data = bytearray(saved(Image.new("RGB", (9, 9)), "WEBP", lossless=True))
    fixed = struct.unpack_from("<I", data, 21)[0] & 0xF0000000
    struct.pack_into("<I", data, 21, fixed | (width - 1) | (height - 1) << 14)
    return bytes(data)


def endless_jpeg(scans: int, side: int = 2000) -> bytes:
    """A progressive JPEG whose last scan is repeated: each repetition costs a pass over all coefficients."""
    good = saved(Image.effect_noise((side, side), 10).convert("L"), "JPEG", progressive=True, quality=5)
    last = good.rindex(b"\xff\xda")
    return good[:last] + good[last:-2] * scans + good[-2:]


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n(/etc/passwd) (r) file\n"
_GREY = [(258, SHORT, 1, 8), (259, SHORT, 1, 1), (262, SHORT, 1, 1), (277, SHORT, 1, 1), (273, LONG, 1, 200)]


def bombs() -> dict[str, bytes]:
    """Files that would cost gigabytes or hours if they were believed."""
    huge = png_file(50_000, 50_000, zlib.compress(bytes(1000)))
    text = b"Comment\x00\x00" + zeros(32 << 20)
    profile = b"icc\x00\x00" + zeros(32 << 20)
    small = zlib.compress(bytes(101 * 100))
    gif = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0xF7, 0, 0) + bytes(768)
    frame = b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x08\x02\x01\x00\x00;"
    strips = [(256, LONG, 1, 9000), (257, LONG, 1, 9000), *_GREY, (278, LONG, 1, 1), (279, LONG, 0x7FFFFFFF, 8)]
    return {
        "png header of 2.5 gigapixels": huge,
        "png header of 2^31 columns": png_file(2**31 - 1, 1, b""),
        "png of zeros, 90 megapixels": png_file(9500, 9500, zeros(9501 * 9500)),
        "png of 16-bit zeros, 20 megapixels": png_file(5000, 4000, zeros(10001 * 4000), depth=16),
        "png of transparent zeros, 90 megapixels": png_file(9500, 9500, zeros(38001 * 9500), colour=6),
        "png with 32 MB of text": png_file(100, 100, small, png_chunk(b"zTXt", text)),
        "png with 32 MB of profile": png_file(100, 100, small, png_chunk(b"iCCP", profile)),
        "png of 100,000 chunks": png_file(100, 100, small, *[png_chunk(b"teXt", b"a")] * 100_000),
        "png in an icon, 2.5 gigapixels": icon(huge),
        "png in an apple icon, 2.5 gigapixels": apple_icon(huge),
        "icon in an icon in an icon": icon(icon(icon(huge))),
        "gif of 4 gigapixels": gif + frame,
        "tiff of 2^31 strips": tiff_file(*strips),
        "tiff of 4 gigapixels": tiff_file((256, LONG, 1, 65535), (257, LONG, 1, 65535), *_GREY, (279, LONG, 1, 8)),
        "tiff of 0 columns": tiff_file((256, LONG, 1, 0), (257, LONG, 1, 10), *_GREY, (279, LONG, 1, 8)),
        "tiff whose strips lie at the end of the world": tiff_file(
            (256, LONG, 1, 100), (257, LONG, 1, 100), *_GREY[:4], (273, LONG, 1, 0xFFFFFFF0), (279, LONG, 1, 10_000)
        ),
        "tiff of 60,000 samples a pixel": tiff_file(
            (256, LONG, 1, 100), (257, LONG, 1, 100), *_GREY[:3], (277, SHORT, 1, 60_000), (273, LONG, 1, 8)
        ),
        "tiff with a tile of 268 megapixels": tiled_tiff(16_384),
        "tiff with a tile of 268 megapixels, or of 256": tiled_tiff(16_384, 16),
        "tiff with a tag of 4 gigabytes": tiff_file(
            *_GREY, (256, LONG, 1, 9), (257, LONG, 1, 9), (700, 7, 2**32 - 1, 8)
        ),
        "tiff whose directory points at itself": b"II*\x00\x08\x00\x00\x00\x00\x00\x08\x00\x00\x00",
        "webp of 268 megapixels": _webp_of_size(16383, 16383),
        "ppm of 10^16 pixels": b"P6 100000000 100000000 255\n",
        "ppm of 99 megapixels and no data": b"P6 9900 10000 255\n",
        "ppm with a number of a million digits": b"P6 " + b"9" * 1_000_000 + b" 1 255\n",
        "tga of 4 gigapixels": struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 65535, 65535, 24, 0),
        "bmp of 2^31 rows": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 9, -(2**31) + 1, 1, 24, *[0] * 6),
        "jpeg of 65500 × 65500": b"\xff\xd8\xff\xc0\x00\x0b\x08\xff\xdc\xff\xdc\x01\x01\x11\x00\xff\xd9",
        "jpeg of 20,000 scans": endless_jpeg(20_000),
        "jpeg of 50,000 segments": b"\xff\xd8" + b"\xff\xe0\x00\x02" * 50_000 + b"\xff\xd9",
        "jpeg 2000 of 10^18 pixels": b"\xff\x4f\xff\x51\x00\x29\x00\x00"
        + struct.pack(">8I", *[2**30] * 2, 0, 0, *[2**30] * 2, 0, 0),
        "nothing": b"",
        "one byte": b"\xff",
        "zeros": bytes(1 << 20),
        "zip": b"PK\x03\x04" + bytes(100),
        "postscript": POSTSCRIPT,
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>',
    }


FORMATS = ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "AVIF", "JPEG2000", "ICO", "ICNS", "PPM", "TGA", "PCX")
FORMATS += ("SGI", "QOI", "DDS", "XBM", "MSP", "BLP", "SPIDER")
_MODES = {"XBM": "1", "MSP": "1", "BLP": "P", "SPIDER": "F", "GIF": "P", "ICNS": "RGBA", "ICO": "RGBA"}


def mutated(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`count` damaged files of every format that can be written here."""
    draw = random.Random(seed)
    picture = Image.effect_noise((64, 64), 80)
    for file_format in FORMATS:
        good = saved(picture.convert(_MODES.get(file_format, "RGB")), file_format)
        for number in range(count):
            yield f"{file_format} {number}", damage(good, draw)


def damage(good: bytes, draw: random.Random) -> bytes:
    """A file flipped, cut, doubled or overwritten in places, more often near its beginning."""
    data = bytearray(good)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        place = draw.randrange(min(len(data), draw.choice((32, 200, len(data)))))
        data[place] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))
    if draw.random() < 0.2:
        del data[draw.randrange(len(data)) :]
    if draw.random() < 0.1:
        place = draw.randrange(len(data) + 1)
        data[place:place] = data[: draw.randrange(1, 300)]
    return bytes(data)

"""WebDataset shards: list the images of a tar by their byte range, so that each can be read alone.

A sample is the run of members that share a name up to the first dot (https://github.com/webdataset/webdataset).
Its `.json`, `.cls` and `.txt` members ride along as the text columns `json`, `cls` and `txt`. Names with dots of their
own (`www.site.com_1.jpg`, dates, versions) make one sample of many images: each has the sidecars of its own name. A
sample of one image (`1.image.jpg`, `1.caption.txt`) has nobody else to give them to.
"""

import logging
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from pipeline.logs import warn_once
from pipeline.sources.reading import open_object
from pipeline.storage import Options, redact

_log = logging.getLogger(__name__)

SIDECARS = ("json", "cls", "txt")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
# What the decoders read goes by these; anything else in a sample (arrays, video, captions) is no image.
_IMAGE_SUFFIXES = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "mpo", "ico", "tga"}
    | {"heic", "heics", "heif", "heifs", "hif", "avif", "avifs", "jp2", "j2k", "jpc", "j2c", "jpf", "jpx", "jpm"}
    | {"ppm", "pgm", "pbm", "pnm", "pfm", "pcx", "dcx", "dds", "qoi", "psd", "icns", "cur", "fit", "fits", "sgi"}
    | {"rgb", "rgba", "bw", "ras", "xbm", "xpm", "blp", "fli", "flc", "icb", "vda", "vst", "im", "msp", "pcd", "pxr"}
    | {"ftc", "ftu", "gbr"}
    | {"img", "image"}
)
_MAX_SIDECAR_BYTES = 1 << 20
_ZEROS_BYTES = 64 << 10

# Texts of a sample by the member's name without its suffix, then by suffix.
Sidecars = dict[str, dict[str, str]]


class TarImage(NamedTuple):
    """One image: its name, where its bytes lie, and the text of its sidecars by suffix.

    Of a sparse file, which has no such place, no bytes behind its first header: a failure when it is read.
    """

    name: str
    offset: int
    length: int
    sidecars: dict[str, str]


def list_tar(uri: str, storage_options: Options) -> Iterator[TarImage]:
    """The images in the shard at `uri`, in the order of the tar.

    Raises tarfile.ReadError when the file is no uncompressed tar, or breaks off or is damaged at a header; what was
    yielded before that is good. Raises SourceError when it cannot be read at all.
    """
    with open_object(uri, storage_options) as file, _open(file, uri) as shard:
        sample: list[tarfile.TarInfo] = []
        sidecars: Sidecars = {}
        large, first_large = 0, ""
        key = None
        try:
            for member in _members(shard, file, uri):
                if member is None or _key(member.name) != key:
                    yield from _images(sample, sidecars)
                    sample, sidecars, key = [], {}, _key(member.name) if member else None
                if member is None:
                    continue
                stem, suffix = _split(member.name)
                if suffix in SIDECARS and member.size > _MAX_SIDECAR_BYTES:
                    large, first_large = large + 1, first_large or member.name
                elif suffix in SIDECARS:
                    sidecars.setdefault(stem, {})[suffix] = _text(shard, member)
                elif suffix in _IMAGE_SUFFIXES or not suffix:
                    sample.append(member)
        except (tarfile.ReadError, ValueError) as error:
            yield from _images(sample, sidecars)
            _tell_large(uri, large, first_large)
            raise _damaged(uri, error) from error
        yield from _images(sample, sidecars)
        _tell_large(uri, large, first_large)


def _open(file: BinaryIO, uri: str) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except tarfile.ReadError as error:
        raise tarfile.ReadError(
            f"{redact(uri)} is not an uncompressed tar ({error}); unpack a .tar.gz first, "
            "members of a compressed tar cannot be read by range"
        ) from error
    except ValueError as error:
        raise _damaged(uri, error) from error


def _damaged(uri: str, error: Exception) -> tarfile.ReadError:
    """For a ReadError of tarfile, or the ValueError that it lets out where the map of a sparse member is cut short."""
    return tarfile.ReadError(f"{redact(uri)} breaks off or is damaged ({error})")


def _tell_large(uri: str, count: int, first: str) -> None:
    if count:
        warn_once(
            _log,
            ("large texts", uri.rpartition("/")[0]),
            "%s: texts of more than %d MiB beside images are left out, here %d, of which the first is %s, and in other "
            "shards of the same folder; make them smaller, or give them as columns of a table",
            redact(uri),
            _MAX_SIDECAR_BYTES >> 20,
            count,
            first,
        )


def _members(shard: tarfile.TarFile, file: BinaryIO, uri: str) -> Iterator[tarfile.TarInfo | None]:
    """The regular files of the shard, hidden ones left out; None between two tars of which one is behind the other.

    Forgets what it has given: shards may hold millions.
    """
    while True:
        while (member := shard.next()) is not None:
            shard.members.clear()  # type: ignore[attr-defined]
            if member.isfile() and not member.name.rpartition("/")[2].startswith("."):
                yield member
        # tarfile takes a damaged header for the end, in silence; the true end is a block of zeros or of the file.
        file.seek(shard.offset)
        block = file.read(tarfile.BLOCKSIZE)
        if not block:
            _log.warning(
                "%s: the tar has no end mark; members behind byte %s may be missing", redact(uri), shard.offset
            )
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"no valid header at byte {shard.offset:,}")
        behind = _behind_zeros(file, shard.offset)
        if behind is None:
            return
        file.seek(behind)
        if len(file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
            _log.warning(
                "%s: what is behind the end of the tar, at byte %s, is too short for another one and is left out",
                redact(uri),
                f"{behind:,}",
            )
            return
        shard.offset = behind
        shard.pax_headers = {}  # the global ones hold up to the end of their tar
        yield None


def _behind_zeros(file: BinaryIO, place: int) -> int | None:
    """The first block from `place` on that is not all zeros: whoever appends one tar to another leaves the end mark and
    the padding of the first between them. None where there is none up to the end of the file."""
    file.seek(place)
    while block := file.read(_ZEROS_BYTES):
        if found := block.lstrip(b"\0"):
            return (place + len(block) - len(found)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        place += len(block)
    return None


def _text(shard: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    content = shard.extractfile(member)
    return content.read().decode("utf-8", "replace").strip() if content else ""


def _key(name: str) -> str:
    """The name of the sample."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _split(name: str) -> tuple[str, str]:
    """The name without its suffix, and the suffix in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.rpartition(".")
    return (f"{folder}{slash}{stem}", suffix.lower()) if dot else (name, "")


def _images(sample: list[tarfile.TarInfo], sidecars: Sidecars) -> Iterator[TarImage]:
    """Each image with the sidecars of the whole sample (`1.txt`) and, before those, its own (`1.left.txt`). Only where
    there is one image, all others are its own too (`1.caption.txt`)."""
    others = tuple(sidecars) if len(sample) == 1 else ()
    for member in sample:
        names = (*others, _key(member.name), _split(member.name)[0], member.name)
        texts = {suffix: text for name in names for suffix, text in sidecars.get(name, {}).items()}
        if member.issparse():
            # Its bytes lie in pieces, and where they begin nothing says whose they are; its first header does.
            yield TarImage(member.name, member.offset + tarfile.BLOCKSIZE, 0, texts)
        else:
            yield TarImage(member.name, member.offset_data, member.size, texts)

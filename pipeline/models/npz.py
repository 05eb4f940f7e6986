"""Reading `.npz` archives of arrays: headers without the data, and nothing that needs unpickling."""

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline.models.architecture import Shape
from schemas.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

MAX_EXPANSION = 20
CHUNK_BYTES = 8 * 1024 * 1024
# Of a member: magic, version, flags, method, time, date, CRC, packed and unpacked size, bytes of name and extra field.
_LOCAL_HEADER = struct.Struct("<4s5HIIIHH")
_IN_ZIP64 = 0xFFFFFFFF


def read_npz_shapes(path: Path) -> dict[str, Shape]:
    """Name → shape of every array.

    Raises CheckpointError for a truncated file, an archive bomb, or arrays that are not floating point.
    """
    with _opened(path) as archive:
        return {_name(member.filename): _header(archive, member, path)[0] for member in archive.infolist()}


def read_npz(path: Path) -> dict[str, "np.ndarray[Any, Any]"]:
    """Every array as float32. bfloat16, which NumPy stores as two raw bytes, is widened.

    Raises CheckpointError as `read_npz_shapes` does, and for an array that is damaged.
    """
    import numpy as np

    arrays = {}
    with _opened(path) as archive:
        for member in archive.infolist():
            shape, dtype, fortran = _header(archive, member, path)
            with _data(archive, member, path) as file:
                values = np.frombuffer(file.read(), dtype=np.uint16 if dtype.kind == "V" else dtype)
            if dtype.kind == "V":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            array = values.reshape(shape, order="F" if fortran else "C")
            arrays[_name(member.filename)] = array.astype(np.float32, copy=False)
    return arrays


def is_all_zeros(path: Path, name: str) -> bool:
    """Whether every byte of an array is 0. It is read up to the first that is not, and little of it at once.

    Raises CheckpointError where what is read is damaged.
    """
    import numpy as np

    with _opened(path) as archive:
        member = next(each for each in archive.infolist() if _name(each.filename) == name)
        with _data(archive, member, path) as file:
            return not any(np.frombuffer(chunk, np.uint8).any() for chunk in iter(lambda: file.read(CHUNK_BYTES), b""))


@contextmanager
def _data(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> Iterator[IO[bytes]]:
    """An array's file behind its header. Raises CheckpointError where reading it in the block finds damage."""
    with archive.open(member) as file:
        _skip_header(file)
        try:
            yield file
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise CheckpointError(f"{path}: {_name(member.filename)} is damaged: {error}") from error


def _opened(path: Path) -> zipfile.ZipFile:
    size = path.stat().st_size
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        needed = _needed_bytes(path)
        if needed > size:
            raise CheckpointError(f"{path}: truncated; expected at least {needed} bytes, it has {size}") from error
        raise CheckpointError(f"{path}: truncated, or no .npz archive: {error}; it has {size} bytes") from error
    unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > MAX_EXPANSION * size:
        archive.close()
        raise CheckpointError(f"{path}: an archive of {size} bytes that unpacks to {unpacked} is refused")
    return archive


def _name(member: str) -> str:
    return member.removesuffix(".npy")


def _needed_bytes(path: Path) -> int:
    """What a cut-off archive needs for the arrays that begin in it and their directory; 0 where none does.

    The archive's directory stands at its end, but each member says its size in front as well (APPNOTE.TXT 4.3.7);
    NumPy writes it into the ZIP64 extra field, which begins with the unpacked and the packed size. In the directory a
    member takes 46 bytes and its name, and 22 bytes close the archive.
    """
    end, directory = 0, 22
    with path.open("rb") as file:
        while len(front := file.read(_LOCAL_HEADER.size)) == _LOCAL_HEADER.size:
            magic, *_, packed, _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(front)
            if magic != b"PK\x03\x04":
                break
            file.seek(name_bytes, os.SEEK_CUR)
            extra = file.read(extra_bytes)
            if packed == _IN_ZIP64 and len(extra) >= 20:
                packed = int.from_bytes(extra[12:20], "little")
            end = file.tell() + packed
            directory += 46 + name_bytes
            file.seek(end)
    return end and end + directory


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> tuple[Shape, "np.dtype[Any]", bool]:
    name = _name(member.filename)
    try:
        with archive.open(member) as file:
            shape, fortran, dtype = _skip_header(file)
            data_bytes = member.file_size - file.tell()
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {name} is no NumPy array, or is cut off: {error}") from error
    if not (dtype.kind == "f" or dtype.str == "|V2" or name.endswith(("step", "/t"))):
        raise CheckpointError(f"{path}: {name} is {dtype}; only floating-point arrays are read")
    expected = math.prod(shape) * dtype.itemsize
    if expected != data_bytes:
        raise CheckpointError(
            f"{path}: {name} says {dtype} {list(shape)}, which is {expected} bytes, but has {data_bytes}; "
            "fetch it again"
        )
    return tuple(int(side) for side in shape), dtype, fortran


def _skip_header(file: IO[bytes]) -> Any:
    from numpy.lib import format as npy

    version = npy.read_magic(file)
    return npy.read_array_header_1_0(file) if version == (1, 0) else npy.read_array_header_2_0(file)

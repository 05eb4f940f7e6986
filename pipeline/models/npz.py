"""Reading `.npz` archives of arrays: headers without the data, and nothing that needs unpickling."""

import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline.models.architecture import Shape
from schemas.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

MAX_EXPANSION = 20


def read_npz_shapes(path: Path) -> dict[str, Shape]:
    """Name → shape of every array.

    Raises CheckpointError for a truncated file, an archive bomb, or arrays that are not floating point.
    """
    with _opened(path) as archive:
        return {_name(member): _header(archive, member, path)[0] for member in archive.namelist()}


def read_npz(path: Path) -> dict[str, "np.ndarray[Any, Any]"]:
    """Every array as float32. bfloat16, which NumPy stores as two raw bytes, is widened."""
    import numpy as np

    arrays = {}
    with _opened(path) as archive:
        for member in archive.namelist():
            shape, dtype, fortran = _header(archive, member, path)
            with archive.open(member) as file:
                _skip_header(file)
                values = np.frombuffer(file.read(), dtype=np.uint16 if dtype.kind == "V" else dtype)
            if dtype.kind == "V":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            arrays[_name(member)] = values.reshape(shape, order="F" if fortran else "C").astype(np.float32, copy=False)
    return arrays


def _opened(path: Path) -> zipfile.ZipFile:
    size = path.stat().st_size
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path}: truncated, or no .npz archive: {error}; it has {size} bytes") from error
    unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > MAX_EXPANSION * size:
        archive.close()
        raise CheckpointError(f"{path}: an archive of {size} bytes that unpacks to {unpacked} is refused")
    return archive


def _name(member: str) -> str:
    return member.removesuffix(".npy")


def _header(archive: zipfile.ZipFile, member: str, path: Path) -> tuple[Shape, "np.dtype[Any]", bool]:
    try:
        with archive.open(member) as file:
            shape, fortran, dtype = _skip_header(file)
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{path}: {_name(member)} is no NumPy array, or is cut off: {error}") from error
    if not (dtype.kind == "f" or dtype.str == "|V2" or _name(member).endswith(("step", "/t"))):
        raise CheckpointError(f"{path}: {_name(member)} is {dtype}; only floating-point arrays are read")
    return tuple(int(side) for side in shape), dtype, fortran


def _skip_header(file: IO[bytes]) -> Any:
    from numpy.lib import format as npy

    version = npy.read_magic(file)
    return npy.read_array_header_1_0(file) if version == (1, 0) else npy.read_array_header_2_0(file)

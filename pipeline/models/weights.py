"""Reading weight files: safetensors (memory-mapped), `.bin`/`.pth`/`.pt` (never unpickled), whole or in shards.

Nothing in a checkpoint is executed. A safetensors header is read by ourselves, so that a truncated file can be named
with the size it should have; the format is an 8-byte little-endian header length, a JSON header, then the data.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.models.architecture import Shape
from pipeline.models.npz import read_npz_shapes
from pipeline.models.state_dicts import load_torch, unwrapped
from schemas.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON_BYTES = 64 * 1024 * 1024
MAX_HEADER_BYTES = 100_000_000
FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json")
TORCH_SUFFIXES = (".bin", ".pth", ".pt", ".pth.tar")
WEIGHT_SUFFIXES = (".safetensors", *TORCH_SUFFIXES, ".npz")
# What transformers' Trainer keeps beside a checkpoint to go on from it.
TRAINING_STATE = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
# What PEFT saves in place of a model.
ADAPTER = "adapter_model"
ADAPTER_CONFIG = "adapter_config.json"
# In the names of files that hold the weights together only.
SHARD = re.compile(r"-\d+-of-\d+\.")


class Weights(NamedTuple):
    """Where the tensors lie. `index_file` is the JSON that names the shards, if there are any."""

    kind: str
    files: tuple[Path, ...]
    index_file: Path | None = None

    @property
    def folder(self) -> Path:
        """Where they lie, and the config and the preprocessor beside them."""
        return self.files[0].parent


def find_weights(folder: Path) -> Weights:
    """The weight files of a folder, or of a path that is itself a weight file. safetensors goes before `.bin`.

    Under another name, a weight file is taken if it is the only one (`.bin` says too little for that).

    Raises CheckpointError if there are none, several, or only an adapter's, or if a shard that the index names is not
    there.
    """
    if folder.is_file():
        if folder.name.startswith(ADAPTER):
            _refuse_adapter(folder.parent)
        return Weights(_kind(folder), (folder,))
    for whole, index in (SAFETENSORS, TORCH):
        if (folder / whole).is_file():
            return Weights(_kind(folder / whole), (folder / whole,))
        if (folder / index).is_file():
            return _sharded(folder / index)
    names = sorted(path.name for path in folder.iterdir())
    loose = _loose(names)
    if len(loose) == 1:
        return Weights(_kind(folder / loose[0]), (folder / loose[0],))
    _refuse_adapter(folder)
    refuse_several(names, str(folder))
    found = ", ".join(names[:20]) or "nothing"
    raise CheckpointError(
        f"{folder}: no weights; expected model.safetensors (or shards with model.safetensors.index.json) or "
        f"pytorch_model.bin. Found: {found}"
    )


def is_weight_file(name: str) -> bool:
    """Whether a file of this name may hold the weights of a model."""
    return name.endswith(WEIGHT_SUFFIXES) and not name.startswith((*TRAINING_STATE, ADAPTER))


def _loose(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if is_weight_file(name) and not name.endswith(".bin"))


def refuse_several(names: Iterable[str], where: str) -> None:
    """Raise CheckpointError where several weight files lie in the folder `where`, and none by whose name it is the one
    that counts."""
    loose = _loose(names := set(names))
    if len(loose) < 2 or names & {*SAFETENSORS, *TORCH, ADAPTER_CONFIG} or any(map(SHARD.search, loose)):
        return
    best = next((name for name in loose if "best" in name), loose[0])
    raise CheckpointError(f"{where}: {len(loose)} checkpoints there; name one, such as {where.rstrip('/')}/{best}")


def _refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError where PEFT saved an adapter (LoRA and its kin): matrices to be added to another model."""
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "a model that it does not name"
        raise CheckpointError(
            f"{folder}: an adapter for {base}, not a model. Merge the two once where peft is installed: "
            "PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained('folder')"
        )


def _kind(path: Path) -> str:
    if path.suffix == ".safetensors":
        return "safetensors"
    if path.name.endswith(TORCH_SUFFIXES):
        return "torch"
    if path.suffix == ".npz":
        return "npz"
    raise CheckpointError(f"{path}: not a weight file that can be read; expected one of {', '.join(WEIGHT_SUFFIXES)}")


def _sharded(index: Path) -> Weights:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensor names to file names")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index}: shard {outside[0]!r} does not lie beside the index; only plain names are read")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(f"{index}: shards are missing beside it: {', '.join(absent)}")
    files = tuple(index.parent / name for name in names)
    return Weights(_kind(files[0]), files, index)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError if it is absent, not JSON, no object, or larger than any config is."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes; a config of more than {MAX_JSON_BYTES} bytes is refused")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_shapes(weights: Weights) -> dict[str, Shape]:
    """Name → shape of every tensor, without reading the data of safetensors files.

    Raises CheckpointError for a truncated or foreign file, a file that needs unpickling, or tensors that are not
    floating point.
    """
    shapes: dict[str, Shape] = {}
    for path in weights.files:
        _refuse_stand_in(path)
        if weights.kind == "safetensors":
            shapes |= _safetensors_shapes(path)
        elif weights.kind == "npz":
            shapes |= read_npz_shapes(path)
        else:
            shapes |= {name: tuple(tensor.shape) for name, tensor in _torch_tensors(path).items()}
    return unwrapped(shapes)


def read_tensors(weights: Weights) -> dict[str, "Tensor"]:
    """Every tensor, memory-mapped where the file allows it. Raises CheckpointError as `read_shapes` does."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in weights.files:
        if weights.kind == "safetensors":
            _safetensors_shapes(path)
            tensors |= load_file(path)
        else:
            tensors |= _torch_tensors(path)
    return unwrapped(tensors)


def _torch_tensors(path: Path) -> dict[str, "Tensor"]:
    tensors = load_torch(path)
    _require_floats(path, {name: str(each.dtype) for name, each in tensors.items() if not each.is_floating_point()})
    return tensors


def _refuse_stand_in(path: Path) -> None:
    """Raise CheckpointError for what a download may leave under the name of a weight file."""
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a git-lfs pointer, not the file itself. Run git lfs pull in its folder")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path}: a web page, not weights. Fetch the file by the address of its download button")


def _safetensors_shapes(path: Path) -> dict[str, Shape]:
    from safetensors import SafetensorError, safe_open

    actual = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if actual < 8 or length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: not a safetensors file (or cut off: it has {actual} bytes)")
        if actual < 8 + length:
            raise CheckpointError(f"{path}: truncated; its header alone needs {8 + length} bytes, it has {actual}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
            shapes = {str(name): tuple(int(side) for side in entry["shape"]) for name, entry in header.items()}
            dtypes = {str(name): str(entry["dtype"]) for name, entry in header.items()}
        except (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: not a safetensors file; its header cannot be read ({error})") from error
    expected = 8 + length + end
    if actual != expected:
        state = "truncated" if actual < expected else "longer than its header says"
        raise CheckpointError(f"{path}: {state}; expected {expected} bytes, it has {actual}. Fetch it again.")
    _require_floats(path, {name: dtype for name, dtype in dtypes.items() if dtype not in FLOAT_DTYPES})
    try:
        with safe_open(path, framework="np"):
            return shapes
    except SafetensorError as error:  # such as a type that needs other bytes than the tensor has
        raise CheckpointError(f"{path}: its header contradicts itself ({error}). Fetch it again.") from error


def _require_floats(path: Path, others: dict[str, str]) -> None:
    others = {name: dtype for name, dtype in others.items() if not name.endswith(("position_ids", "_position_index"))}
    if others:
        name, dtype = next(iter(others.items()))
        raise CheckpointError(
            f"{path}: {len(others)} tensors are not floating point ({name} is {dtype}); quantised checkpoints are not "
            "supported, use the float32, float16 or bfloat16 one"
        )

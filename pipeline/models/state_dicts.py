"""State dicts in files that torch saved: never unpickled, wherever in the file a training script put them."""

import argparse
import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from schemas.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

# Under which keys training scripts keep a state dict; the first that is there counts. A running mean of the weights
# (EMA) goes before what was trained, as timm has it.
STATE_DICTS = ("state_dict", "model", "model_state_dict", "teacher", "module")
RUNNING_MEANS = ("state_dict_ema", "model_ema")
# What DataParallel, torch.compile and transformers around a model of timm's put before every name.
WRAPPERS = ("module.", "_orig_mod.", "timm_model.")

Each = TypeVar("Each")


def unwrapped(named: Mapping[str, Each]) -> dict[str, Each]:
    """The same under the names that the model itself gives: without a prefix of `WRAPPERS` that stands before all."""
    for prefix in (*WRAPPERS, *WRAPPERS):  # one may be around the other, in either order
        if all(name.startswith(prefix) for name in named):
            named = {name.removeprefix(prefix): value for name, value in named.items()}
    return dict(named)


def load_torch(path: Path) -> dict[str, "Tensor"]:
    """A state dict saved by torch, with `weights_only`: anything but tensors and plain containers is refused.

    The one class let through is argparse.Namespace, in which timm's train.py keeps its settings; it runs nothing.
    """
    import pickle

    import torch

    try:
        _refuse_other_archives(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (CheckpointError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: loading it would run code stored in the file (pickle), which is refused. Convert it once where "
            "you trust it: model.save_pretrained('folder') with transformers, with timm "
            "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        ) from error
    except Exception as error:  # what damaged bytes lead to has no end
        raise CheckpointError(
            f"{path}: not a state dict that torch can read, or truncated ({path.stat().st_size} bytes): {error}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state dict (names and their tensors)")
    tensors = _state_dict(content, path)
    if not tensors:
        keys = ", ".join(sorted(map(str, content))[:20]) or "none"
        raise CheckpointError(
            f"{path}: no tensors, neither at the top nor under {', '.join(STATE_DICTS)}; its keys are: {keys}. Save "
            "the state dict itself: torch.save(model.state_dict(), 'model.pth')"
        )
    return tensors


def _state_dict(content: dict[str, Any], path: Path) -> dict[str, "Tensor"]:
    """The tensors of a training script's file, wherever they are below it. A running mean counts where it is one of the
    very weights that lie beside it; buffers, such as BEiT's relative_position_index, it may lack."""
    plain = content
    while inner := [plain[key] for key in STATE_DICTS if isinstance(plain.get(key), dict)]:
        plain = inner[0]
    tensors = _tensors(plain)
    names = _trained(tensors)
    misfits = []
    for key in RUNNING_MEANS:
        mean = content.get(key)
        places = (mean, mean.get("module")) if isinstance(mean, dict) else ()
        for one in filter(None, (_tensors(place) for place in places if isinstance(place, dict))):
            if not names or _trained(one) == names:
                return one
            misfits.append((key, sorted(_trained(one) ^ names)))
    for key, others in misfits:
        log.warning(
            "%s: has a running mean (%s), but not of the weights beside it: %d other names, such as %s. What was "
            "trained last is taken; for the other save that one alone",
            *(path, key, len(others), others[0]),
        )
    return tensors


def _trained(tensors: Mapping[str, "Tensor"]) -> set[str]:
    return {name for name, tensor in unwrapped(tensors).items() if tensor.is_floating_point()}


def _tensors(content: Mapping[str, Any]) -> dict[str, "Tensor"]:
    """The tensors of a state dict, without the count that torch's AveragedModel keeps among them."""
    import torch

    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor) and name != "n_averaged"}


def _refuse_other_archives(path: Path) -> None:
    """torch.save stores tensors uncompressed; an archive that grows when unpacked was not written by it. torch.jit.save
    keeps code and constants beside them."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
        scripted = any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
    if scripted:
        raise CheckpointError(
            f"{path}: a TorchScript archive, which is code, and none is run. Take the model in Hugging Face's layout "
            "(openai/clip-vit-base-patch32 for OpenAI's ViT-B-32.pt), or save its weights alone where you trust it: "
            "torch.save(torch.jit.load(file).state_dict(), 'model.pth')"
        )
    size = os.path.getsize(path)
    if unpacked > size:
        raise CheckpointError(
            f"{path}: an archive of {size} bytes that unpacks to {unpacked}; torch writes no such file"
        )

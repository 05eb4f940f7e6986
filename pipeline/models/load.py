"""From a described checkpoint to a network that runs."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.models.assemble import assemble
from pipeline.models.formats import npz_vit
from pipeline.models.inspect import ModelInfo, digest_of
from pipeline.models.network import VisionModel
from pipeline.models.npz import read_npz
from pipeline.models.own_head import head_state
from pipeline.models.readout import OUTPUTS
from pipeline.models.remap import remap
from pipeline.models.resolve import resolve
from pipeline.models.weights import Weights, find_weights, read_tensors
from schemas.errors import CheckpointError


def load_model(
    info: ModelInfo,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    storage_options: Mapping[str, Any] = {},
    packed: bool = True,
    outputs: Iterable[str] = OUTPUTS,
) -> VisionModel:
    """The network of `info` in eval mode, without gradients: the trunk in `dtype`, the readout in float32.

    On an x86 CPU the blocks are laid out for the library that multiplies fastest, unless `packed` is false. `outputs`
    are those of `cls`, `pooled` and `logits` that will be used; where the prefix tokens are enough for them, the last
    block computes no others.

    On a machine where `info.folder` does not exist or is incomplete the checkpoint is found again by name and revision.
    Raises CheckpointError if it cannot be, or if its digest is another, here or there.
    """
    weights = _find_planned(info, storage_options)
    with torch.no_grad():
        tensors = remap(_tensors(weights), info.plan)
    return assemble(
        tensors,
        info.network,
        info.preprocessing,
        dtype=dtype,
        device=device,
        packed=packed,
        outputs=outputs,
        head=_word_classifier(info) | head_state(info),
    )


def _word_classifier(info: ModelInfo) -> dict[str, torch.Tensor]:
    """The head of a zero-shot classifier; it reads `pooled` at length 1."""
    if info.zero_shot is None:
        return {}
    vectors = torch.frombuffer(bytearray(info.zero_shot.weights), dtype=torch.float32).view(info.num_labels, -1)
    bias = torch.full((info.num_labels,), info.zero_shot.bias)
    return {"readout.head.weight": vectors * info.zero_shot.scale, "readout.head.bias": bias}


def _tensors(weights: Weights) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors under the names that the plan speaks of."""
    if weights.kind != "npz":
        return read_tensors(weights)
    arrays = npz_vit.normalise(read_npz(weights.files[0]))
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def _find_planned(info: ModelInfo, storage_options: Mapping[str, Any]) -> Weights:
    """The files that the run was planned with: where they were then, else found again by name and revision."""
    try:
        weights = find_weights(Path(info.folder))
        digest = digest_of(weights)
    except (CheckpointError, OSError):
        # Not on this machine, or incomplete: another process may be fetching it from the hub, and is waited for.
        weights = find_weights(resolve(info.name, info.revision, storage_options).folder)
        digest = digest_of(weights)
    if digest != info.digest:
        raise CheckpointError(
            f"{info.name}: the checkpoint in {weights.folder} has digest {digest[:12]}…, but the run was planned with "
            f"{info.digest[:12]}…. Make the same files visible to every machine and leave them as they are until the "
            "run has ended, or pin --revision."
        )
    return weights

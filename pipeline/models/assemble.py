"""From tensors under our own names to a network that runs. Needs torch alone."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pipeline.models.architecture import Architecture
from pipeline.models.fold import fold
from pipeline.models.kernels import choose_linear, cpu_libraries, replace_linears
from pipeline.models.network import VisionModel
from pipeline.models.precision import describe_hardware, dtype_name
from pipeline.models.prefix import prefix_suffices, read_prefix_only
from pipeline.models.readout import OUTPUTS

_HEADS = ("readout.head.", "readout.distillation_head.")
# What stands between the products where those are in 8 bits.
TRUNK_DTYPES = {torch.int8: torch.float32, torch.float8_e4m3fn: torch.bfloat16}


def assemble(
    tensors: Mapping[str, torch.Tensor],
    network: Architecture,
    preprocessing: Any,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    packed: bool = True,
    outputs: Iterable[str] = OUTPUTS,
    head: Mapping[str, torch.Tensor] = {},
) -> VisionModel:
    """A network in eval mode from `tensors`, as `architecture.tensor_shapes` names them.

    `preprocessing` has what `schemas.preprocessing.Preprocessing` has: `mean`, `std`, `rescale_factor` and
    `output_size`. `head`: parameters of a classifier in place of the checkpoint's. For the rest see `load.load_model`.
    """
    with torch.no_grad():
        state = fold(tensors, network, preprocessing, TRUNK_DTYPES.get(dtype, dtype))
        if head:
            state = {name: tensor for name, tensor in state.items() if not name.startswith(_HEADS)} | dict(head)
    with torch.device("meta"):
        model = VisionModel(network, preprocessing.output_size).eval().requires_grad_(False)
    model.load_state_dict(state, assign=True)
    model.to(device)
    model.readout.outputs = frozenset(outputs)
    if prefix_suffices(network, model.readout.outputs):
        model.trunk.prefix_block = read_prefix_only(model.trunk.blocks, network.prefix_tokens)
    if packed:
        kind = torch.device(device).type
        name, hardware = dtype_name(dtype), describe_hardware(cuda=kind == "cuda")
        replace_linears(model.trunk, choose_linear(name, kind, hardware, cpu_libraries(), network.activation))
    elif dtype in TRUNK_DTYPES:
        raise ValueError(f"{dtype_name(dtype)} is a kind of packed layer: packed=False leaves none")
    return model

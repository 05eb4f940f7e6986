"""google-research's `.npz`: arrays in the names and axis order of vision_transformer, from timm's modules."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

Arrays = dict[str, np.ndarray[Any, Any]]


def arrays_of(model: Any) -> Arrays:
    """timm's ViT or hybrid ViT."""
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    patch = "patch_embed.proj"
    out = {
        "embedding/kernel": state[f"{patch}.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state[f"{patch}.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        **norm(state, "norm", "Transformer/encoder_norm"),
    }
    if "cls_token" in state:
        out["cls"] = state["cls_token"]
    if "head.weight" in state:
        out |= dense(state, "head", "head")
    for i in range(len(model.blocks)):
        out |= block(state, model, i)
    if "patch_embed.backbone" in " ".join(state):
        out |= stem(state)
    return out


def block(state: Mapping[str, Any], model: Any, i: int) -> Arrays:
    """A pre-norm block."""
    width, heads = model.embed_dim, model.blocks[0].attn.num_heads
    theirs, ours = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
    attention = f"{theirs}MultiHeadDotProductAttention_1/"
    out = norm(state, f"{ours}norm1", f"{theirs}LayerNorm_0") | norm(state, f"{ours}norm2", f"{theirs}LayerNorm_2")
    weights, biases = (np.split(state[f"{ours}attn.qkv.{each}"], 3) for each in ("weight", "bias"))
    for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
        out[f"{attention}{name}/kernel"] = weight.T.reshape(width, heads, -1)
        out[f"{attention}{name}/bias"] = bias.reshape(heads, -1)
    out[f"{attention}out/kernel"] = state[f"{ours}attn.proj.weight"].T.reshape(heads, -1, width)
    out[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"]
    for number, layer in enumerate(("fc1", "fc2")):
        out |= dense(state, f"{ours}mlp.{layer}", f"{theirs}MlpBlock_3/Dense_{number}")
    return out


def stem(state: Mapping[str, Any]) -> Arrays:
    """The ResNet of a hybrid: `backbone.stem` and `backbone.stages`, or in R+Ti/16 the stem's modules alone."""
    out: Arrays = {}
    for full_name, array in state.items():
        name = full_name.removeprefix("patch_embed.backbone.").removeprefix("stem.")
        if name == full_name:
            continue
        *path, module, parameter = name.split(".")
        where = f"block{int(path[1]) + 1}/unit{int(path[3]) + 1}/" if path and path[0] == "stages" else ""
        if "downsample" in path:
            module += "_proj"
        kind, number = module.rstrip("123"), module[-1] if module[-1] in "123" else ""
        number = "_root" if not where else "_proj" if module.endswith("_proj") else number
        if kind.startswith("conv"):
            out[f"{where}conv{number}/kernel"] = array.transpose(2, 3, 1, 0)
        else:
            out[f"{where}gn{number}/{'scale' if parameter == 'weight' else 'bias'}"] = array.reshape(1, 1, 1, -1)
    return out


def mixer_arrays_of(model: Any) -> Arrays:
    """timm's MLP-Mixer."""
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    out = {
        "stem/kernel": state["stem.proj.weight"].transpose(2, 3, 1, 0),
        "stem/bias": state["stem.proj.bias"],
        **norm(state, "norm", "pre_head_layer_norm"),
    }
    if "head.weight" in state:
        out |= dense(state, "head", "head")
    for i in range(len(model.blocks)):
        theirs, ours = f"MixerBlock_{i}/", f"blocks.{i}."
        out |= norm(state, f"{ours}norm1", f"{theirs}LayerNorm_0") | norm(state, f"{ours}norm2", f"{theirs}LayerNorm_1")
        for mlp, mixing in (("mlp_tokens", "token_mixing"), ("mlp_channels", "channel_mixing")):
            for number, layer in enumerate(("fc1", "fc2")):
                out |= dense(state, f"{ours}{mlp}.{layer}", f"{theirs}{mixing}/Dense_{number}")
    return out


def norm(state: Mapping[str, Any], ours: str, theirs: str) -> Arrays:
    return {f"{theirs}/scale": state[f"{ours}.weight"], f"{theirs}/bias": state[f"{ours}.bias"]}


def dense(state: Mapping[str, Any], ours: str, theirs: str) -> Arrays:
    return {f"{theirs}/kernel": state[f"{ours}.weight"].T, f"{theirs}/bias": state[f"{ours}.bias"]}


class Shaped:
    """A timm model on the meta device, whose state dict is zeros that take no memory."""

    def __init__(self, model: Any) -> None:
        self.embed_dim, self.blocks = getattr(model, "embed_dim", 0), model.blocks
        self._state = {name: torch.zeros(1).expand(value.shape) for name, value in model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return self._state


def to_values(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) → −1 … 1, (B, 3, H, W)."""
    return (pixels / 127.5 - 1).permute(0, 3, 1, 2)

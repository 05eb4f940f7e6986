"""Attention rollout: Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (arXiv 2005.00928).

For each block, the attention weights are averaged over the heads, the identity is added for the residual connection,
and rows are normalised to sum to 1; the products of these matrices from the first block to the last say how much each
token of the last layer draws on each patch.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.models.architecture import Architecture
from pipeline.models.inspect import ModelInfo
from pipeline.models.layers import split_heads
from pipeline.models.load import load_model
from pipeline.models.network import VisionModel

Origin = Literal["cls", "mean"]
_MEAN_POOLED = ("layernormed_mean_patch_tokens", "mean_all_tokens")


def rollout_origin(a: Architecture) -> Origin:
    """Whose attention the map shows: the CLS token's, or the mean of the patch tokens' where that is what the model
    represents an image by (BEiT, models that pool by mean, models without CLS).

    `pooled` may be a mean that only we take; where the checkpoint's classifier reads it, it is the model's own."""
    beit_mean = a.network == "beit" and "mean" in a.pooled
    classified_mean = a.pooled == "mean_patch_tokens" and a.head_input == "pooled"
    return "mean" if beit_mean or classified_mean or a.pooled in _MEAN_POOLED or not a.class_token else "cls"


@torch.inference_mode()
def attention_rollout(model: VisionModel, pixels: Tensor) -> Tensor:
    """Rollout for uint8 pixels (B, H, W, 3) over the patches: float32 (B, rows, columns).

    The shares that go to CLS and registers are left out, so a map sums to less than 1. Raises ValueError for a
    network without attention.
    """
    a = model.architecture
    if a.network == "mixer":
        raise ValueError("an MLP-Mixer has no attention")
    layers: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda block, inputs: layers.append(_flow(block, *inputs)))
        for block in model.trunk.blocks
    ]
    try:
        model.trunk(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    rollout = layers[0]  # (B, T, T)
    for layer in layers[1:]:
        rollout = layer @ rollout
    first = a.prefix_tokens
    rows = rollout[:, 0] if rollout_origin(a) == "cls" else rollout[:, first:].mean(dim=1)  # (B, T)
    return rows[:, first:].reshape(len(pixels), *a.grid(model.image_size))


def _flow(block: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention weights of `block` for its input (B, T, D), averaged over heads, identity added, renormalised."""
    width = x.shape[-1]
    q, k, _ = split_heads(block.qkv(block.norm1(x)), block.heads)
    scores = (q @ k.transpose(-2, -1)).float() * (width // block.heads) ** -0.5  # (B, heads, T, T)
    if bias is not None:
        scores = scores + bias.float()
    weights = scores.softmax(dim=-1).mean(dim=1) + torch.eye(x.shape[1], device=x.device)
    flow: Tensor = weights / weights.sum(dim=-1, keepdim=True)
    return flow


class Rollout:
    """`attention_rollout` in float32 on the CPU, for arrays."""

    def __init__(self, info: ModelInfo, storage_options: Mapping[str, Any]) -> None:
        self._model = load_model(info, storage_options=storage_options)

    def __call__(self, picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """One picture (H, W, 3) → (rows, columns)."""
        rollout = attention_rollout(self._model, torch.from_numpy(picture[None].copy()))
        weights: npt.NDArray[np.float32] = rollout[0].numpy()
        return weights

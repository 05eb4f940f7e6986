"""What is measured: networks of published sizes with random weights, and pictures that differ from each other."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.models.architecture import Architecture, tensor_shapes
from pipeline.models.assemble import assemble
from pipeline.models.precision import torch_dtype

LARGE = {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096}
BASE = {"width": 768, "depth": 12, "heads": 12, "mlp_width": 3072}
TINY = {"width": 64, "depth": 2, "heads": 2, "mlp_width": 128}
# Images that an actor gets at once, by side, where 16 to 32 cores decode for one GPU (`pipeline/placement.py`).
CALL_ROWS = {224: 512, 384: 256}
EXACT_IMAGES = 8
# Images at once where all attention scores lie in memory: 3 GB of them at 384 pixels.
DIRECT_IMAGES = 64

Features = tuple[torch.Tensor, torch.Tensor]


def vit(shape: dict[str, int], side: int) -> Architecture:
    return Architecture("vit", **shape, patch_size=(16, 16), trained_size=(side, side), epsilon=1e-6, pooled="pooler")


def beit(shape: dict[str, int], side: int) -> Architecture:
    return Architecture(
        "beit", **shape, patch_size=(16, 16), trained_size=(side, side), epsilon=1e-6, positions="none",
        relative_positions="shared", layer_scale=True, qkv_bias="all", pooled="layernormed_mean_patch_tokens",
        pool_norm="made_up", final_norm=False,
    )  # fmt: skip


def networks(tiny: bool) -> dict[str, Architecture]:
    """What matters most first."""
    if tiny:
        return {"tiny ViT": vit(TINY, 32), "tiny BEiT": beit(TINY, 32)}
    return {
        "ViT-L/16": vit(LARGE, 224),
        "ViT-B/16": vit(BASE, 224),
        "BEiT-L/16": beit(LARGE, 224),
        "ViT-L/16 at 384": vit(LARGE, 384),
    }


def random_tensors(a: Architecture) -> dict[str, torch.Tensor]:
    """Weights that give activations of order one."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in tensor_shapes(a).items():
        values = torch.randn(shape, generator=generator)
        fan_in = int(np.prod(shape[1:]))
        if len(shape) == 1:
            centre = 1.0 if name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "scale1", "scale2")) else 0.0
            values = centre + 0.1 * values
        elif "table" in name or "token" in name or name == "positions":
            values *= 0.5
        else:
            values /= fan_in**0.5
        found[name] = values
    return found


def network(
    a: Architecture, tensors: dict[str, torch.Tensor], dtype: str, device: torch.device, *, packed: bool = True
) -> Any:
    preprocessing = SimpleNamespace(mean=(0.5,) * 3, std=(0.5,) * 3, rescale_factor=1 / 255, output_size=a.trained_size)
    outputs = ("cls", "pooled")
    return assemble(tensors, a, preprocessing, dtype=torch_dtype(dtype), device=device, outputs=outputs, packed=packed)


class Weights(NamedTuple):
    """Of a network, and the CLS and pooled features of the first EXACT_IMAGES pictures in float32."""

    tensors: dict[str, torch.Tensor]
    exact: Features


@torch.inference_mode()
def weights(a: Architecture, device: torch.device) -> Weights:
    tensors = random_tensors(a)
    model = network(a, tensors, "float32", device)
    return Weights(tensors, direct(model, pictures(EXACT_IMAGES, a.trained_size), device))


@torch.inference_mode()
def direct(model: Any, pixels: npt.NDArray[np.uint8], device: torch.device) -> Features:
    """CLS and pooled on the host: no graph, no buffer, and attention by no kernel that is among those on trial."""
    some = (pixels[start : start + DIRECT_IMAGES] for start in range(0, len(pixels), DIRECT_IMAGES))
    with sdpa_kernel(SDPBackend.MATH):
        parts = [model(torch.from_numpy(batch).to(device)) for batch in some]
    cls, pooled = (torch.cat([getattr(part, name).float().cpu() for part in parts]) for name in ("cls", "pooled"))
    return cls, pooled


@lru_cache(maxsize=1)
def pictures(count: int, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Noise around a colour of each picture's own (n, H, W, 3), which a network tells apart; the first ones are the
    same for any `count`."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8)
    pixels >>= 2
    pixels += np.random.default_rng(1).integers(0, 192, (count, 1, 1, 3), np.uint8)
    return pixels

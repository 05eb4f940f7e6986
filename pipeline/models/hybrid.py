"""The ResNet in front of a hybrid ViT: BiT's ResNet v1 with group norm and weight-standardised convolutions.

Dosovitskiy et al. (arXiv 2010.11929), section 3.1; Kolesnikov et al., "Big Transfer" (arXiv 1912.11370). Padding is
TensorFlow's SAME, in which the odd pixel goes to the right and the bottom. The constants are those timm runs Google's
weights with: 1e-8 on the variance of a filter and 1e-5 in group norm (flax: 1e-5 on the deviation, 1e-6).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.architecture import Architecture, Stem

if TYPE_CHECKING:
    from schemas.preprocessing import Preprocessing

GROUPS = 32
GROUP_EPSILON = 1e-5
FILTER_EPSILON = 1e-8


def same_padding(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """`x` (B, C, H, W) padded such that ceil(H / stride) × ceil(W / stride) windows fit."""
    down, across = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:])
    if not down and not across:
        return x
    return F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2), value=value)


class Convolution(nn.Conv2d):
    """Without a bias; its filters are standardised when they are loaded."""

    def __init__(self, channels: int, filters: int, kernel: int, stride: int = 1) -> None:
        super().__init__(channels, filters, kernel, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(same_padding(x, self.kernel_size[0], self.stride[0]))


class Unit(nn.Module):
    """Bottleneck: 1×1, 3×3, 1×1 with a norm behind each, and the input added, projected where shapes differ."""

    def __init__(self, channels: int, inner: int, stride: int, *, project: bool) -> None:
        super().__init__()
        self.conv1, self.norm1 = Convolution(channels, inner, 1), _norm(inner)
        self.conv2, self.norm2 = Convolution(inner, inner, 3, stride), _norm(inner)
        self.conv3, self.norm3 = Convolution(inner, 4 * inner, 1), _norm(4 * inner)
        self.conv_proj = Convolution(channels, 4 * inner, 1, stride) if project else nn.Identity()
        self.norm_proj = _norm(4 * inner) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.norm_proj(self.conv_proj(x)))


class ResNetStem(nn.Module):
    """uint8 pixels (B, H, W, 3) → features (B, C, H / stride, W / stride).

    A pixel goes in less `centre`, its mean, so that the padding's zero means what it does behind normalisation; the
    scale stands in the root convolution.
    """

    def __init__(self, stem: Stem) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.empty(3))
        self.root, self.root_norm = Convolution(3, stem.width, 7, 2), _norm(stem.width)
        self.stages = nn.Sequential()
        channels = stem.width
        for stage, count in enumerate(stem.units):
            inner, units = stem.width * 2**stage, nn.Sequential()
            for unit in range(count):
                stride = 2 if stage and not unit else 1
                units.append(Unit(channels, inner, stride, project=not unit))
                channels = 4 * inner
            self.stages.append(units)

    def forward(self, pixels: Tensor) -> Tensor:
        x = (pixels.float() - self.centre).permute(0, 3, 1, 2)
        x = F.relu(self.root_norm(self.root(x)))
        x = F.max_pool2d(same_padding(x, 3, 2, float("-inf")), 3, 2)
        return self.stages(x)  # type: ignore[no-any-return]


class HybridEmbedding(nn.Module):
    """uint8 pixels (B, H, W, 3) → patch tokens (B, N, D), cut out of the stem's features.

    The stem runs in float32, on a GPU in TF32 where the rest runs in less: 50 rounded layers with a ReLU behind each
    turn the features away (cosine 0.995 for R50+L/32 with random weights in bfloat16).
    """

    def __init__(self, a: Architecture, stem: Stem) -> None:
        super().__init__()
        self.stem = ResNetStem(stem)
        self.kernel = (a.patch_size[0] // stem.stride, a.patch_size[1] // stem.stride)
        self.weight = nn.Parameter(torch.empty(a.width, stem.channels, *self.kernel))

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.is_cuda and self.weight.dtype == torch.float32:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 is cuDNN's default
                return self.tokens(pixels)
        return self.tokens(pixels)

    def tokens(self, pixels: Tensor) -> Tensor:
        features = self.stem(pixels).to(self.weight.dtype)
        return F.conv2d(features, self.weight, stride=self.kernel).flatten(2).transpose(1, 2)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, GROUP_EPSILON)


def fold_stem(tensors: Mapping[str, Tensor], preprocessing: Preprocessing) -> dict[str, Tensor]:
    """Parameters of `HybridEmbedding` in float32: filters standardised, the pixels' scale in the root."""
    state = {name: tensor.float() for name, tensor in tensors.items() if name.startswith("stem.")}
    for name, tensor in state.items():
        if tensor.ndim == 4:
            state[name] = standardise(tensor)
    rescale, mean, std = preprocessing.rescale_factor, preprocessing.mean, preprocessing.std
    state["stem.centre"] = torch.tensor([m / rescale for m in mean])
    state["stem.root.weight"] *= torch.tensor([rescale / s for s in std])[:, None, None]
    return {**state, "weight": tensors["patch.weight"].float()}


def standardise(weight: Tensor) -> Tensor:
    """Each filter of `weight` (filters, C, kh, kw) with mean 0 and variance 1."""
    variance, mean = torch.var_mean(weight.double(), dim=(1, 2, 3), correction=0, keepdim=True)
    return ((weight.double() - mean) / (variance + FILTER_EPSILON).sqrt()).float()

"""What a network is made of, and which tensors that takes.

`Architecture` is read from a checkpoint's config and shapes by the files in `formats/`; the networks in `vit.py`,
`beit.py` and `mixer.py` are built from it alone. `tensor_shapes` gives the tensors under our own names, before anything
is folded: the common tongue into which each format translates its own.
"""

import math
from dataclasses import dataclass
from typing import Literal

Network = Literal["vit", "beit", "mixer"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
QkvBias = Literal["all", "query_value", "none"]
Positions = Literal["none", "patches", "all", "all_and_registers"]
Resize = Literal["bicubic", "bicubic_antialias", "bilinear_corners"]
TableResize = Literal["bilinear", "geometric"]
PoolNorm = Literal["none", "trained", "made_up"]
Pooled = Literal[
    "pooler",
    "mean_patch_tokens",
    "layernormed_mean_patch_tokens",
    "mean_all_tokens",
    "cls",
    "layernormed_cls",
    "attention_pool",
    "projected_cls",
]
HeadInput = Literal["none", "cls", "pooled", "unit_pooled", "cls_and_mean", "cls_and_distillation"]


@dataclass(frozen=True)
class Stem:
    """The ResNet in front of a hybrid: channels of its root convolution, and bottleneck units of each stage."""

    width: int
    units: tuple[int, ...]

    @property
    def stride(self) -> int:
        """Pixels between two features: 4 behind the root, twice as many from the second stage on."""
        return int(4 * 2 ** max(0, len(self.units) - 1))

    @property
    def channels(self) -> int:
        """Channels of the features."""
        return int(self.width * 4 * 2 ** (len(self.units) - 1)) if self.units else self.width


@dataclass(frozen=True)
class Architecture:
    """A vision transformer, described. Sizes in pixels are (height, width); a grid is counted in patches.

    `positions`: whether learned absolute positions cover only the patches, or CLS and distillation tokens too, or
    registers as well. `position_resize`, `table_resize`: how the checkpoint's own library brings positions and BEiT's
    tables to another grid. `pool_norm`: a LayerNorm behind the pooling; `made_up` where the reference library makes
    one up (weight 1, bias 0). `projection_width`: width of `pooled` where a projection follows. `head_input`: what
    the classifier reads. `visual_tokens`: size of the codebook that a BEiT pre-training head predicts from, through a
    LayerNorm of its own with `token_norm`.
    """

    network: Network
    width: int
    depth: int
    heads: int
    mlp_width: int
    patch_size: tuple[int, int]
    trained_size: tuple[int, int]
    epsilon: float
    activation: Activation = "gelu"
    swiglu: bool = False
    patch_bias: bool = True
    qkv_bias: QkvBias = "all"
    class_token: bool = True
    distillation_token: bool = False
    registers: int = 0
    positions: Positions = "all"
    position_resize: Resize = "bicubic"
    table_resize: TableResize = "bilinear"
    relative_positions: Literal["none", "shared", "each"] = "none"
    pre_norm: bool = False
    layer_scale: bool = False
    final_norm: bool = True
    pooled: Pooled = "mean_patch_tokens"
    pool_norm: PoolNorm = "none"
    projection_width: int = 0
    projection_bias: bool = True
    head_input: HeadInput = "none"
    num_labels: int = 0
    stem: Stem | None = None
    token_mlp_width: int = 0
    visual_tokens: int = 0
    token_norm: bool = False

    @property
    def prefix_tokens(self) -> int:
        """Tokens in front of the patches: CLS, distillation, registers."""
        return int(self.class_token) + int(self.distillation_token) + self.registers

    @property
    def positioned_prefix(self) -> int:
        """How many of the prefix tokens the position table covers."""
        covered = int(self.class_token) + int(self.distillation_token)
        return {"all": covered, "all_and_registers": self.prefix_tokens}.get(self.positions, 0)

    @property
    def trained_grid(self) -> tuple[int, int]:
        """Patches (down, across) that the position table was trained on."""
        return self.grid(self.trained_size)

    @property
    def feature_width(self) -> int:
        """Width of `pooled`."""
        return self.projection_width or self.width

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Patches (down, across) of an image of `size` pixels."""
        return size[0] // self.patch_size[0], size[1] // self.patch_size[1]


Shape = tuple[int, ...]


def relative_table_rows(grid: tuple[int, int]) -> int:
    """Rows of BEiT's relative position table: every offset between two patches, and three for CLS."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def tensor_shapes(a: Architecture) -> dict[str, Shape]:
    """Name → shape of every tensor that the architecture needs, in our names."""
    d = a.width
    shapes: dict[str, Shape] = {"patch.weight": (d, 3, *a.patch_size)}
    if a.stem is not None:
        kernel = (a.patch_size[0] // a.stem.stride, a.patch_size[1] // a.stem.stride)
        shapes = {"patch.weight": (d, a.stem.channels, *kernel)} | stem_shapes(a.stem)
    if a.patch_bias:
        shapes["patch.bias"] = (d,)
    if a.class_token:
        shapes["cls_token"] = (1, 1, d)
    if a.distillation_token:
        shapes["distillation_token"] = (1, 1, d)
    if a.registers:
        shapes["registers"] = (1, a.registers, d)
    if a.positions != "none":
        shapes["positions"] = (1, a.positioned_prefix + a.trained_grid[0] * a.trained_grid[1], d)
    if a.relative_positions == "shared":
        shapes["relative_table"] = (relative_table_rows(a.trained_grid), a.heads)
    if a.pre_norm:
        shapes |= _affine("pre_norm", (d,))
    block = _mixer_block_shapes(a) if a.network == "mixer" else _block_shapes(a)
    for i in range(a.depth):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    if a.final_norm:
        shapes |= _affine("norm", (d,))
    return shapes | _readout_shapes(a)


def _affine(name: str, weight: Shape, bias: bool = True) -> dict[str, Shape]:
    return {f"{name}.weight": weight} | ({f"{name}.bias": weight[:1]} if bias else {})


def _block_shapes(a: Architecture) -> dict[str, Shape]:
    d = a.width
    shapes = _affine("norm1", (d,)) | _affine("norm2", (d,)) | _affine("out", (d, d))
    shapes |= _affine("qkv", (3 * d, d), bias=a.qkv_bias != "none")
    shapes |= _affine("fc1", ((1 + a.swiglu) * a.mlp_width, d)) | _affine("fc2", (d, a.mlp_width))
    if a.relative_positions == "each":
        shapes["relative_table"] = (relative_table_rows(a.trained_grid), a.heads)
    if a.layer_scale:
        shapes |= {"scale1": (d,), "scale2": (d,)}
    return shapes


def _mixer_block_shapes(a: Architecture) -> dict[str, Shape]:
    d, tokens = a.width, a.trained_grid[0] * a.trained_grid[1]
    shapes = _affine("norm1", (d,)) | _affine("norm2", (d,))
    shapes |= _affine("token_fc1", (a.token_mlp_width, tokens)) | _affine("token_fc2", (tokens, a.token_mlp_width))
    return shapes | _affine("fc1", (a.mlp_width, d)) | _affine("fc2", (d, a.mlp_width))


def stem_shapes(stem: Stem) -> dict[str, Shape]:
    """Tensors of a hybrid's ResNet: 1×1, 3×3, 1×1 convolutions in a unit, a projection in the first of a stage."""
    shapes: dict[str, Shape] = {"stem.root.weight": (stem.width, 3, 7, 7)} | _affine("stem.root_norm", (stem.width,))
    channels = stem.width
    for stage, units in enumerate(stem.units):
        inner = stem.width * 2**stage
        for unit in range(units):
            name = f"stem.stages.{stage}.{unit}."
            convolutions = {
                "1": (inner, channels, 1, 1),
                "2": (inner, inner, 3, 3),
                "3": (4 * inner, inner, 1, 1),
                "_proj": (4 * inner, channels, 1, 1),
            }
            for which, shape in convolutions.items():
                if which != "_proj" or unit == 0:
                    shapes |= {f"{name}conv{which}.weight": shape} | _affine(f"{name}norm{which}", shape[:1])
            channels = 4 * inner
    return shapes


def _readout_shapes(a: Architecture) -> dict[str, Shape]:
    d = a.width
    shapes: dict[str, Shape] = {}
    if a.pooled == "pooler":
        shapes |= _affine("pooler", (a.feature_width, d))
    if a.pool_norm == "trained":
        shapes |= _affine("pool_norm", (d,))
    if a.pooled == "projected_cls" and a.projection_width:
        shapes |= _affine("projection", (a.projection_width, d), bias=a.projection_bias)
    if a.pooled == "attention_pool":
        shapes |= {"attention_pool.probe": (1, 1, d)}
        shapes |= _affine("attention_pool.qkv", (3 * d, d)) | _affine("attention_pool.out", (d, d))
        shapes |= _affine("attention_pool.norm", (d,))
        shapes |= _affine("attention_pool.fc1", (a.mlp_width, d)) | _affine("attention_pool.fc2", (d, a.mlp_width))
    if a.head_input != "none":
        shapes |= _affine("head", (a.num_labels, head_input_width(a)))
    if a.head_input == "cls_and_distillation":
        shapes |= _affine("distillation_head", (a.num_labels, d))
    if a.token_norm:
        shapes |= _affine("token_norm", (d,))
    if a.visual_tokens:
        shapes |= _affine("token_head", (a.visual_tokens, d))
    return shapes


def head_input_width(a: Architecture) -> int:
    """How many numbers the classifier reads."""
    widths = {"pooled": a.feature_width, "unit_pooled": a.feature_width, "cls_and_mean": 2 * a.width}
    return widths.get(a.head_input, a.width)


def parameter_count(a: Architecture) -> int:
    """How many numbers the tensors hold together, but for the zeros in place of a bias that keys do not have."""
    total = sum(math.prod(shape) for shape in tensor_shapes(a).values())
    return total - (a.depth * a.width if a.qkv_bias == "query_value" else 0)

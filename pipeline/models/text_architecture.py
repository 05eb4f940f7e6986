"""What a text tower is made of, and which tensors that takes: the counterpart of `architecture.py`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipeline.models.architecture import Activation, Shape
from pipeline.models.formats.format import Config, Shapes, Spelling

# Where the text's embedding is read: the first token (BERT's CLS), the last one, or the first end-of-text token.
Read = Literal["first", "last", "end"]


@dataclass(frozen=True)
class TextArchitecture:
    """A transformer over tokens, described.

    `length`: tokens of a text. `position_rows`: rows of the position table, at least `length`. `norm_first`: norms
    before attention and MLP and one at the end; else behind them, as in BERT, and one over the embeddings. `segments`:
    rows of BERT's segment table, of which the first is used. `causal`: a token sees those before it only. `masked`:
    token 0 is padding and not seen. `end_token`: where `read` is `end`; None for the highest token, as old CLIP
    configs mean it. `sigmoid`: each label is a yes or no of its own (SigLIP).
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    vocabulary: int
    length: int
    position_rows: int
    epsilon: float
    activation: Activation
    read: Read
    norm_first: bool = True
    segments: int = 0
    causal: bool = False
    masked: bool = False
    end_token: int | None = None
    projection_width: int = 0
    projection_bias: bool = True
    sigmoid: bool = False

    @property
    def feature_width(self) -> int:
        """Width of a text's embedding."""
        return self.projection_width or self.width


class TextFormat(NamedTuple):
    """One kind of text tower in one layout; the counterpart of `Format`.

    `recognise` gives the reason why a checkpoint has such a tower, or "". `prefix` is what the names of its tensors
    begin with. `scale` and `bias` name the logarithm of the factor on cosines, and what is added behind it.
    """

    family: str
    layout: str
    examples: str
    test: str
    recognise: Callable[[Config, Shapes], str]
    architecture: Callable[[Config, Shapes], TextArchitecture]
    spell: Callable[[TextArchitecture, Shapes], Spelling]
    prefix: tuple[str, ...]
    scale: str
    bias: str
    ignored: tuple[str, ...] = ()


def text_shapes(a: TextArchitecture) -> dict[str, Shape]:
    """Name → shape of every tensor that the tower needs, in our names."""
    d = a.width
    shapes: dict[str, Shape] = {"tokens": (a.vocabulary, d), "positions": (a.position_rows, d)}
    if a.segments:
        shapes["segments"] = (a.segments, d)
    shapes |= {"norm.weight": (d,), "norm.bias": (d,)}
    for i in range(a.depth):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in _block(a).items()}
    if a.projection_width:
        shapes["projection.weight"] = (a.projection_width, d)
    if a.projection_width and a.projection_bias:
        shapes["projection.bias"] = (a.projection_width,)
    return shapes


def _block(a: TextArchitecture) -> Mapping[str, Shape]:
    d = a.width
    linear = {"qkv": (3 * d, d), "out": (d, d), "fc1": (a.mlp_width, d), "fc2": (d, a.mlp_width)}
    shapes: dict[str, Shape] = {f"{norm}.{each}": (d,) for norm in ("norm1", "norm2") for each in ("weight", "bias")}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes

"""What a format is, and helpers to read a config with errors that name the key."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pipeline.models.architecture import Activation, Architecture, Shape
from schemas.errors import CheckpointError

Config = Mapping[str, Any]
Shapes = Mapping[str, Shape]

# Our tensor name → theirs. A key may name a module (`.weight` and `.bias` follow by themselves); `{i}` is the block.
# A tuple is concatenated along the first axis; None in it stands for zeros.
Spelling = Mapping[str, str | tuple[str | None, ...]]


class Format(NamedTuple):
    """One family in one layout.

    `examples` and `test` are for the page on checkpoints. `recognise` gives the reason why a checkpoint is of this
    family, or "" if it is not. `architecture` raises CheckpointError for what is not implemented. `spell` gives the
    spelling for an architecture and the names that are there. `ignored` are regular expressions of tensors that the
    forward pass has no use for.
    """

    family: str
    layout: str
    examples: str
    test: str
    recognise: Callable[[Config, Shapes], str]
    architecture: Callable[[Config, Shapes], Architecture]
    spell: Callable[[Architecture, Shapes], Spelling]
    ignored: tuple[str, ...] = ()


ACTIVATION_NAMES: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def activation(config: Config) -> Activation:
    """The MLP's activation. Raises CheckpointError for one that is not implemented."""
    name = config["hidden_act"]
    if not isinstance(name, str) or name not in ACTIVATION_NAMES:
        raise CheckpointError(
            f"config.json: hidden_act {name!r} is not supported; known are {', '.join(sorted(ACTIVATION_NAMES))}"
        )
    return ACTIVATION_NAMES[name]


def positive(config: Config, key: str) -> int:
    """A whole number above 0. Raises CheckpointError naming the key."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key} is {value!r}; expected a whole number above 0")
    return value


def count(config: Config, key: str) -> int:
    """A whole number, 0 or more. Raises CheckpointError naming the key."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CheckpointError(f"config.json: {key} is {value!r}; expected a whole number, 0 or more")
    return value


def ratio(config: Config, key: str) -> float:
    """A number above 0. Raises CheckpointError naming the key."""
    value = config.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json: {key} is {value!r}; expected a number above 0")
    return value


def epsilon(config: Config) -> float:
    """`layer_norm_eps`, what a norm adds to the variance. Raises CheckpointError for what is no small number."""
    value = config.get("layer_norm_eps")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise CheckpointError(f"config.json: layer_norm_eps is {value!r}; expected a small number, such as 1e-12")
    return float(value)


def pair(config: Config, key: str) -> tuple[int, int]:
    """A size given as one number or as [height, width]. Raises CheckpointError naming the key."""
    value = config.get(key)
    match value if isinstance(value, list | tuple) else [value, value]:
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
    raise CheckpointError(f"config.json: {key} is {value!r}; expected one whole number or [height, width]")


def width_and_heads(config: Config) -> tuple[int, int]:
    """`hidden_size` and `num_attention_heads`. Raises CheckpointError unless the heads divide the width."""
    width, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
    if width % heads:
        raise CheckpointError(f"config.json: num_attention_heads {heads} does not divide hidden_size {width}")
    return width, heads

"""A linear classifier of the user's own, on `cls` or `pooled`, in place of the checkpoint's."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pipeline.models.inspect import ModelInfo, OwnHead

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, Any]


def with_head(
    info: ModelInfo,
    labels: tuple[str, ...],
    weight: "Array",
    bias: "Array",
    feature: Literal["cls", "pooled"],
    digest: str,
) -> ModelInfo:
    """`info` with a classifier of `labels` on `feature`: logits = feature @ weight.T + bias.

    `weight` is float32 (labels, D), `bias` float32 (labels,); `digest` tells one head from another.
    """
    return replace(
        info,
        labels=labels,
        multi_label=False,
        regression=False,
        network=replace(info.network, head_input=feature, num_labels=len(labels)),
        head=OwnHead(digest, weight.tobytes(), bias.tobytes()),
    )


def head_state(info: ModelInfo) -> "dict[str, torch.Tensor]":
    """The tensors of the user's head under our own names; none where the checkpoint's is used."""
    import torch

    if info.head is None:
        return {}
    weight, bias = (torch.frombuffer(bytearray(data), dtype=torch.float32) for data in info.head[1:])
    return {"readout.head.weight": weight.view(info.num_labels, -1), "readout.head.bias": bias}

"""What one forward pass gives."""

from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """float32 results of a batch of B images.

    `cls` (B, D): CLS token of the last hidden state behind the final norm; None for a network without a CLS token.
    `pooled` (B, D'): the checkpoint's own image-level representation; `ModelInfo.pooled` says which.
    `logits` (B, L): None for a checkpoint without a classifier.
    """

    cls: Tensor | None
    pooled: Tensor
    logits: Tensor | None

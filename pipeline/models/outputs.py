"""What one forward pass gives."""

from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """float32 results of a batch of B images.

    `cls` (B, D): CLS token of the last hidden state behind the final norm; None for a network without a CLS token.
    `pooled` (B, D'): the checkpoint's own image-level representation; `ModelInfo.pooled` says which. None where the
    model was loaded for other outputs.
    `logits` (B, L): None for a checkpoint without a classifier, or where the model was loaded for other outputs.
    `patches` (B, N, D), float16: patch tokens of the last hidden state, row by row from the top left; None unless
    asked for. `visual_tokens` (B, N), int32: the codebook entry that a BEiT pre-training head predicts for each patch;
    None unless asked for.
    """

    cls: Tensor | None
    pooled: Tensor | None
    logits: Tensor | None
    patches: Tensor | None = None
    visual_tokens: Tensor | None = None

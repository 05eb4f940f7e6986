"""The last block for those who read only the tokens in front of the patches (CLS, distillation).

Keys and values are needed of every token; queries, the output projection and the MLP only of those that are read. That
is ten twelfths of the block's products saved, with the same result.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.architecture import Architecture
from pipeline.models.layers import Block
from pipeline.models.readout import OUTPUTS

PREFIX_POOLED = frozenset({"pooler", "cls", "layernormed_cls", "projected_cls"})
PREFIX_HEADS = frozenset({"cls", "cls_and_distillation"})
POOLED_HEADS = frozenset({"pooled", "unit_pooled"})


def prefix_suffices(a: Architecture, outputs: frozenset[str]) -> bool:
    """Whether all of `outputs` (`cls`, `pooled`, `logits`; never those on request) can be computed from the prefix."""
    pooled_needed = "pooled" in outputs or ("logits" in outputs and a.head_input in POOLED_HEADS)
    head_reads_prefix = a.head_input in PREFIX_HEADS | POOLED_HEADS | {"none"}
    return (
        a.class_token
        and outputs <= OUTPUTS
        and (a.pooled in PREFIX_POOLED or not pooled_needed)
        and (head_reads_prefix or "logits" not in outputs)
    )


class PrefixBlock(nn.Module):
    """The same as `Block` for its first `prefix` tokens: (B, T, D) → (B, prefix, D). Shares the block's weights."""

    def __init__(self, block: Block, prefix: int) -> None:
        super().__init__()
        width = block.out.out_features
        self.heads, self.prefix = block.heads, prefix
        self.swiglu, self.activation = block.swiglu, block.activation
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.q, self.kv = _rows(block.qkv, 0, width), _rows(block.qkv, width, 3 * width)
        self.out, self.fc1, self.fc2 = block.out, block.fc1, block.fc2

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        b, t, width = x.shape
        d = width // self.heads
        normed = self.norm1(x)
        q = self.q(normed[:, : self.prefix]).view(b, self.prefix, self.heads, d).transpose(1, 2)  # (B, heads, P, d)
        k, v = self.kv(normed).view(b, t, 2, self.heads, d).permute(2, 0, 3, 1, 4)  # (B, heads, T, d) each
        mask = None if bias is None else bias[:, :, : self.prefix]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(b, self.prefix, width)
        x = x[:, : self.prefix] + self.out(mixed)
        hidden = self.fc1(self.norm2(x))
        if self.swiglu:
            gate, value = hidden.chunk(2, dim=-1)
            return x + self.fc2(self.activation(gate) * value)  # type: ignore[no-any-return]
        return x + self.fc2(self.activation(hidden))  # type: ignore[no-any-return]


def _rows(linear: nn.Linear, start: int, stop: int) -> nn.Linear:
    """The layer that gives outputs `start` to `stop` of `linear`; a view of its weights."""
    part = nn.Linear(1, 1, bias=linear.bias is not None, device="meta").requires_grad_(False)
    part.in_features, part.out_features = linear.in_features, stop - start
    part.weight = nn.Parameter(linear.weight.detach()[start:stop], requires_grad=False)
    if linear.bias is not None:
        part.bias = nn.Parameter(linear.bias.detach()[start:stop], requires_grad=False)
    return part


def read_prefix_only(blocks: nn.ModuleList, prefix: int) -> PrefixBlock:
    """What takes the place of the last of `blocks`, which must still be as it was loaded."""
    block = blocks[-1]
    assert isinstance(block, Block)
    with torch.no_grad():
        return PrefixBlock(block, prefix)

"""From the last hidden state to what is asked for, in float32: little work, and scores keep their order."""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.architecture import Architecture, head_input_width
from pipeline.models.layers import ACTIVATIONS
from pipeline.models.outputs import Outputs

OUTPUTS = frozenset({"cls", "pooled", "logits"})


class Readout(nn.Module):
    """Last hidden state (B, T, D) → Outputs. Only those named in `outputs` are computed."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.a = a
        self.pooler = nn.Linear(a.width, a.feature_width) if a.pooled == "pooler" else None
        self.pool_norm = nn.LayerNorm(a.width, a.epsilon) if a.pool_norm != "none" else nn.Identity()
        projected = a.pooled == "projected_cls" and a.projection_width > 0
        self.projection = nn.Linear(a.width, a.projection_width, a.projection_bias) if projected else nn.Identity()
        self.attention_pool = AttentionPool(a) if a.pooled == "attention_pool" else None
        self.head = nn.Linear(head_input_width(a), a.num_labels) if a.head_input != "none" else None
        distilled = a.head_input == "cls_and_distillation"
        self.distillation_head = nn.Linear(a.width, a.num_labels) if distilled else None
        self.token_norm = nn.LayerNorm(a.width, a.epsilon) if a.token_norm else nn.Identity()
        self.token_head = nn.Linear(a.width, a.visual_tokens) if a.visual_tokens else None
        self.outputs = OUTPUTS

    def forward(self, tokens: Tensor, also: Collection[str] = ()) -> Outputs:
        """`also` names the outputs that are made only on request: `patches`, `visual_tokens`."""
        cls = tokens[:, 0] if self.a.class_token else None
        wants_logits = "logits" in self.outputs and self.head is not None
        head_reads_pooled = wants_logits and self.a.head_input in ("pooled", "unit_pooled")
        pooled = self.pool(tokens) if "pooled" in self.outputs or head_reads_pooled else None
        patches = tokens[:, self.a.prefix_tokens :]
        return Outputs(
            cls,
            pooled,
            self.logits(tokens, pooled) if wants_logits else None,
            patches.half() if "patches" in also else None,
            self.visual_tokens(patches) if "visual_tokens" in also else None,
        )

    def visual_tokens(self, patches: Tensor) -> Tensor:
        """The likeliest codebook entry for each patch token (B, N, D) → int32 (B, N). One image at a time: the scores
        over the whole codebook would take more memory than everything else."""
        assert self.token_head is not None
        best = [self.token_head(self.token_norm(image)).argmax(dim=-1) for image in patches]
        return torch.stack(best).int()

    def pool(self, tokens: Tensor) -> Tensor:
        """The checkpoint's own image-level representation (B, D')."""
        kind = self.a.pooled
        if self.pooler is not None:
            token = tokens[:, 0] if self.a.class_token else tokens[:, self.a.prefix_tokens :].mean(dim=1)
            return torch.tanh(self.pooler(token))
        if self.attention_pool is not None:
            return self.pool_norm(self.attention_pool(tokens[:, self.a.prefix_tokens :]))  # type: ignore[no-any-return]
        if kind in ("cls", "layernormed_cls", "projected_cls"):
            return self.projection(self.pool_norm(tokens[:, 0]))  # type: ignore[no-any-return]
        first = 0 if kind == "mean_all_tokens" else self.a.prefix_tokens
        return self.pool_norm(tokens[:, first:].mean(dim=1))  # type: ignore[no-any-return]

    def logits(self, tokens: Tensor, pooled: Tensor | None) -> Tensor | None:
        """Classifier scores (B, L) before softmax or sigmoid."""
        if self.head is None:
            return None
        if self.distillation_head is not None:
            return (self.head(tokens[:, 0]) + self.distillation_head(tokens[:, 1])) / 2  # type: ignore[no-any-return]
        if self.a.head_input == "unit_pooled" and pooled is not None:
            return self.head(F.normalize(pooled, dim=1))  # type: ignore[no-any-return]
        if self.a.head_input == "pooled":
            return self.head(pooled)  # type: ignore[no-any-return]
        if self.a.head_input == "cls_and_mean":
            mean = tokens[:, self.a.prefix_tokens :].mean(dim=1)
            return self.head(torch.cat([tokens[:, 0], mean], dim=1))  # type: ignore[no-any-return]
        return self.head(tokens[:, 0])  # type: ignore[no-any-return]


class AttentionPool(nn.Module):
    """SigLIP's head: one learned query attends to the patch tokens, then a residual MLP (arXiv 2303.15343)."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.heads = a.heads
        self.activation = ACTIVATIONS[a.activation]
        self.probe = nn.Parameter(torch.empty(1, 1, a.width))
        self.qkv = nn.Linear(a.width, 3 * a.width)
        self.out = nn.Linear(a.width, a.width)
        self.norm = nn.LayerNorm(a.width, a.epsilon)
        self.fc1 = nn.Linear(a.width, a.mlp_width)
        self.fc2 = nn.Linear(a.mlp_width, a.width)

    def forward(self, tokens: Tensor) -> Tensor:
        b, _, d = tokens.shape
        query = F.linear(self.probe.expand(b, 1, d), self.qkv.weight[:d], self.qkv.bias[:d])  # (B, 1, D)
        key, value = F.linear(tokens, self.qkv.weight[d:], self.qkv.bias[d:]).chunk(2, dim=-1)  # (B, T, D) each
        q, k, v = (x.view(b, -1, self.heads, d // self.heads).transpose(1, 2) for x in (query, key, value))
        pooled = self.out(F.scaled_dot_product_attention(q, k, v).reshape(b, d))  # (B, D)
        return pooled + self.fc2(self.activation(self.fc1(self.norm(pooled))))  # type: ignore[no-any-return]

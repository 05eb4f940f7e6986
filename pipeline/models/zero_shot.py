"""A classifier from words: each label becomes a vector by the checkpoint's own text tower.

As in CLIP (arXiv 2103.00020, section 3.1.4): a label goes into each template, the embeddings of length 1 are averaged,
and the mean is brought to length 1 again. Scores are softmax, for SigLIP sigmoid, of scale · cosine + bias.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.models.families import described_as, recognise_text
from pipeline.models.formats import npz_vit
from pipeline.models.formats.format import Config, Shapes
from pipeline.models.inspect import ModelInfo, ZeroShot, stand_ins
from pipeline.models.npz import read_npz
from pipeline.models.remap import Plan, check, plan_shapes, remap, require_depth
from pipeline.models.text_architecture import TextArchitecture, TextFormat, text_shapes
from pipeline.models.tokenizing import Tokenizer, file_digest, find_vocabulary, load_tokenizer
from pipeline.models.weights import Weights, find_weights, read_json, read_shapes, read_tensors
from schemas.errors import CheckpointError, SpecError

if TYPE_CHECKING:
    import numpy as np

    from pipeline.models.text import TextTower

DEFAULT_TEMPLATES = ("a photo of a {}.",)
BATCH = 64


class TextInfo(NamedTuple):
    """The text tower of a checkpoint, described: where it is, how its tensors map to ours."""

    weights: Weights
    row: TextFormat
    network: TextArchitecture
    plan: Plan


def inspect_text(info: ModelInfo) -> TextInfo | None:
    """Describe the text tower of `info`; None where the checkpoint has none.

    Raises SpecError for one whose space `pooled` is not in, CheckpointError if tensors are missing, unexpected or of
    another shape.
    """
    weights = find_weights(Path(info.folder))
    with described_as("a model", info.name):
        config, shapes = _described(weights)
        found = recognise_text(config, shapes)
    if found is None:
        return None
    row, reason = found
    with described_as(row.family, info.name):
        network = row.architecture(config, shapes)
        require_depth(network.depth, shapes, info.name)
        wanted = plan_shapes(text_shapes(network), row.spell(network, shapes))
    names = (*row.prefix, row.scale, row.bias)
    own = {name: shape for name, shape in shapes.items() if name.startswith(row.prefix) or name in names}
    assumed = f"{info.name}: its text tower taken for {row.family} in {row.layout} layout, as {reason}"
    check(wanted, own, (*row.ignored, row.scale, row.bias), assumed)
    if network.feature_width != info.pooled_size:
        raise SpecError(
            f"{info.name}: its texts are vectors of {network.feature_width} numbers, its `pooled` of {info.pooled_size}"
        )
    return TextInfo(weights, row, network, wanted)


def _described(weights: Weights) -> tuple[Config, Shapes]:
    shapes = read_shapes(weights)
    if weights.kind != "npz":
        return read_json(weights.folder / "config.json"), shapes
    arrays = npz_vit.normalise_text(stand_ins(shapes))
    return {"raw_shapes": shapes}, {name: array.shape for name, array in arrays.items()}


class TextModel(NamedTuple):
    """A text tower that runs, with its tokenizer. Cosines times `scale` plus `bias` are logits."""

    tower: "TextTower"
    tokenizer: Tokenizer
    scale: float
    bias: float

    def embed(self, texts: Sequence[str]) -> "np.ndarray[Any, Any]":
        """Vectors of length 1, float32 (B, E)."""
        import numpy as np
        import torch

        ids = torch.from_numpy(self.tokenizer(texts))
        return np.concatenate([self.tower(ids[i : i + BATCH]).numpy() for i in range(0, len(ids), BATCH)])


def load_text(info: ModelInfo, vocabulary: str | None = None) -> TextModel:
    """The text tower of `info` in float32 on the CPU.

    Raises SpecError where there is none; else the errors are those of `inspect_text` and `tokenizing`.
    """
    import torch

    from pipeline.models.text import TextTower

    text = inspect_text(info)
    if text is None:
        raise SpecError(
            f"{info.name} ({info.architecture}) has no text tower; texts need one of CLIP, SigLIP or LiT, image and "
            "text tower in one checkpoint"
        )
    tokenizer = load_tokenizer(find_vocabulary(Path(info.folder), vocabulary), text.network)
    tensors = _tensors(text)
    if text.row.scale not in tensors:
        raise CheckpointError(f"{info.name}: {text.row.scale} is missing, by which cosines become scores")
    scale = float(tensors[text.row.scale].float().exp())
    bias = float(tensors[text.row.bias]) if text.row.bias in tensors else 0.0
    with torch.device("meta"):
        tower = TextTower(text.network).eval().requires_grad_(False)
    tower.load_state_dict({name: value.float() for name, value in remap(tensors, text.plan).items()}, assign=True)
    return TextModel(tower, tokenizer, scale, bias)


def _tensors(text: TextInfo) -> Mapping[str, Any]:
    if text.weights.kind != "npz":
        return read_tensors(text.weights)
    import torch

    arrays = npz_vit.normalise_text(read_npz(text.weights.files[0]))
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def with_labels(
    info: ModelInfo, labels: Sequence[str], templates: Sequence[str] | None = None, vocabulary: str | None = None
) -> ModelInfo:
    """`info` with a classifier of `labels`, in their order, in place of its own.

    Raises SpecError for labels or templates that cannot be, and as `load_text` does.
    """
    labels, templates = check_labels(labels), check_templates(templates or DEFAULT_TEMPLATES)
    text = load_text(info, vocabulary)
    if len(labels) == 1 and not text.tower.a.sigmoid:
        raise SpecError(
            f"--zero-shot: {labels[0]!r} alone would have the score 1 in every picture, because scores of "
            f"{info.name} add up to 1 over the labels; add what it is to be told from, such as 'something else'"
        )
    parts = (labels, templates, file_digest(text.tokenizer.where))
    zero_shot = ZeroShot(
        templates=templates,
        digest=hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
        weights=class_vectors(text, labels, templates).tobytes(),
        scale=text.scale,
        bias=text.bias,
    )
    return replace(
        info,
        labels=labels,
        multi_label=text.tower.a.sigmoid,
        regression=False,
        network=replace(info.network, head_input="unit_pooled", num_labels=len(labels)),
        zero_shot=zero_shot,
    )


def class_vectors(text: TextModel, labels: Sequence[str], templates: Sequence[str]) -> "np.ndarray[Any, Any]":
    """A vector of length 1 for each label, float32 (L, E): the mean direction over the templates."""
    import numpy as np

    total = np.zeros((len(labels), text.tower.a.feature_width), np.float64)
    for template in templates:
        total += text.embed([template.replace("{}", label) for label in labels])
    mean: np.ndarray[Any, Any] = total / np.linalg.norm(total, axis=1, keepdims=True)
    return mean.astype(np.float32)


def check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """`labels` without surrounding blanks. Raises SpecError if there are none, or one stands there twice."""
    stripped = tuple(label.strip() for label in labels)
    if not stripped or not all(stripped):
        raise SpecError("--zero-shot: expected one label a line, at least one of them, none of them empty")
    seen: dict[str, int] = {}
    for line, label in enumerate(stripped, start=1):
        if label in seen:
            raise SpecError(f"--zero-shot: {label!r} stands there twice, as labels {seen[label]} and {line}; keep one")
        seen[label] = line
    return stripped


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """`templates` themselves. Raises SpecError for one without a place for the label, or with two."""
    for template in templates:
        if template.count("{}") != 1:
            raise SpecError(
                f"--templates: {template!r} has {template.count('{}')} places for the label; write {{}} once, as in "
                f"{DEFAULT_TEMPLATES[0]!r}"
            )
    return tuple(templates)

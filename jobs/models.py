"""`models`: what a checkpoint is, before a GPU is spent on it."""

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from jobs.options import AsForEmbed, AsJson, FinalNorm, Options, Revision, parse_options
from jobs.output import emit, show_rows


def models(
    model: Annotated[str, typer.Argument(help="A folder, an object-store prefix or a hub name.", metavar="MODEL")],
    revision: Revision = None,
    image_size: AsForEmbed = None,
    label_file: AsForEmbed = None,
    beit_final_norm: FinalNorm = False,
    storage_options: Options = None,
    as_json: AsJson = False,
) -> int:
    """What a checkpoint is: family, sizes, preprocessing, heads, labels, pooling, parameters, cost and digest."""
    from pipeline.models import inspect_model
    from schemas.values import parse_image_size

    info = inspect_model(
        model,
        revision=revision,
        image_size=parse_image_size(image_size),
        beit_final_norm=beit_final_norm,
        label_file=label_file,
        storage_options=parse_options(storage_options),
    )
    facts = describe(info)
    if as_json:
        emit(json.dumps(facts))
    else:
        show_rows([(name.replace("_", " "), _shown(value)) for name, value in facts.items() if value is not None])
    return 0


COMMANDS: dict[str, Callable[..., Any]] = {"models": models}


def describe(info: Any) -> dict[str, Any]:
    """A ModelInfo as JSON-ready facts."""
    from pipeline.models.cost import forward_flop

    net = info.network
    pixels = info.preprocessing
    down, across = net.grid(info.image_size)
    features = [f"cls {info.hidden_size}"] * info.has_cls
    features += [f"pooled {info.pooled_size} ({info.pooled})", f"patches {down * across} x {info.hidden_size}"]
    features += [f"visual_tokens {down}x{across}"] if net.visual_tokens else []
    zero_head = [f"left out: {info.zero_head:,} classes, all zeros"] if info.zero_head else []
    return {
        "model": info.name,
        "revision": info.revision,
        "family": f"{info.family} ({info.architecture}, {info.layout} layout)",
        "size": f"{net.depth} layers, {net.width} wide, "
        + (f"MLP {net.token_mlp_width} over the patches, " if net.network == "mixer" else f"{net.heads} heads, ")
        + f"MLP {net.mlp_width}, patch {net.patch_size[0]}x{net.patch_size[1]}"
        + (f", ResNet stem {net.stem.units}" if net.stem else ""),
        "input": f"{info.image_size[0]}x{info.image_size[1]}",
        "trained_at": f"{net.trained_size[0]}x{net.trained_size[1]}",
        "preprocessing": pixels.model_dump(mode="json"),
        "features": ", ".join(features),
        "heads": ", ".join(heads(net) + zero_head) or "none",
        "text_tower": text_tower(info) or "none",
        "labels": f"{info.num_labels:,} ({', '.join(info.labels[:3])}, …)" if info.num_labels else "none",
        "multi_label": info.multi_label,
        "parameters": info.parameters,
        "gflop_an_image": round(forward_flop(net, info.image_size) / 1e9, 1),
        "digest": info.digest,
    }


def text_tower(info: Any) -> str:
    """The text tower beside the image tower; "" without one."""
    from pipeline.models import inspect_text

    text = inspect_text(info)
    if text is None:
        return ""
    net = text.network
    return f"{net.depth} layers, {net.width} wide, {net.heads} heads, {net.length} tokens of {net.vocabulary:,}"


def heads(net: Any) -> list[str]:
    """What stands behind the blocks of an Architecture, in words."""
    reads = {
        "cls": "CLS",
        "pooled": "pooled",
        "cls_and_mean": "CLS beside the mean of the patches",
        "cls_and_distillation": "CLS, and a second one the distillation token",
    }
    found = [f"classifier of {net.num_labels:,} classes, reads {reads[net.head_input]}"] if net.num_labels else []
    found += [f"pooler {net.feature_width}"] if net.pooled == "pooler" else []
    found += [f"projection {net.projection_width}"] if net.pooled == "projected_cls" and net.projection_width else []
    found += ["attention pool"] if net.pooled == "attention_pool" else []
    found += [f"codebook of {net.visual_tokens:,} visual tokens"] if net.visual_tokens else []
    return found


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items() if item is not None)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

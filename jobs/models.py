"""`models`: what a checkpoint is, before a GPU is spent on it."""

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from jobs.directory import AsJson, Options, emit, parse_options, show_rows


def models(
    model: Annotated[str, typer.Argument(help="A folder, an object-store prefix or a hub name.", metavar="MODEL")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    image_size: Annotated[int | None, typer.Option(help="As for embed.")] = None,
    storage_options: Options = None,
    as_json: AsJson = False,
) -> int:
    """What a checkpoint is: family, sizes, preprocessing, labels, pooling, parameters, cost and digest."""
    from pipeline.models import inspect_model

    options = parse_options(storage_options)
    info = inspect_model(model, revision=revision, image_size=image_size, storage_options=options)
    facts = describe(info)
    if as_json:
        emit(json.dumps(facts))
    else:
        show_rows([(name.replace("_", " "), _shown(value)) for name, value in facts.items()])
    return 0


COMMANDS: dict[str, Callable[..., Any]] = {"models": models}


def describe(info: Any) -> dict[str, Any]:
    """A ModelInfo as JSON-ready facts."""
    from pipeline.models.cost import forward_flop

    net = info.network
    pixels = info.preprocessing
    return {
        "model": info.name,
        "revision": info.revision,
        "family": f"{info.family} ({info.architecture}, {info.layout} layout)",
        "size": f"{net.depth} layers, {net.width} wide, "
        + (f"MLP {net.token_mlp_width} over the patches, " if net.network == "mixer" else f"{net.heads} heads, ")
        + f"MLP {net.mlp_width}, patch {net.patch_size[0]}x{net.patch_size[1]}"
        + (f", ResNet stem {net.stem.units}" if net.stem else ""),
        "input": f"{info.image_size[0]}x{info.image_size[1]}",
        "preprocessing": pixels.model_dump(mode="json"),
        "features": f"cls {info.hidden_size}, " * info.has_cls + f"pooled {info.pooled_size} ({info.pooled})",
        "labels": f"{info.num_labels:,} ({', '.join(info.labels[:3])}, …)" if info.num_labels else "none",
        "multi_label": info.multi_label,
        "parameters": info.parameters,
        "gflop_an_image": round(forward_flop(net, info.image_size) / 1e9, 1),
        "digest": info.digest,
    }


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items() if item is not None)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

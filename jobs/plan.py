"""`plan`: how many machines, how long, how many bytes, with the arithmetic shown."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.options import (
    SAMPLED,
    AsForEmbed,
    AsJson,
    Options,
    SeveralAsForEmbed,
    options_given,
    parse_options,
    sampled_values,
)
from jobs.output import emit
from schemas.errors import SpecError

if TYPE_CHECKING:
    from pipeline.planning import Device, Plan
    from pipeline.sampling import Sample

_SCALES = {
    "bytes": ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")),
    "h": ((24.0, "days"), (1.0, "h"), (1 / 60, "min"), (1 / 3600, "s")),
}


# What --run has measured already.
_OF_A_SOURCE = ("model", "device", "features", "labels", "feature_dtype", "decode", *SAMPLED)


def plan(
    context: typer.Context,
    source: Annotated[list[str] | None, typer.Argument(help="As for embed; a sample of it is measured.")] = None,
    model: Annotated[str | None, typer.Option(help="A folder, an object-store prefix or a hub name.")] = None,
    images: Annotated[str, typer.Option(help="How many images, such as 250000, 40e6 or 1e9.")] = "1e6",
    device: Annotated[
        str, typer.Option(help="What runs the model: t4, a10g, l4, l40s, a100, h100, h200, cpu or cpu-amx.")
    ] = "l4",
    devices: Annotated[int | None, typer.Option(min=1, help="How many of them (cpu: cores); 1 if not given.")] = None,
    hours: Annotated[float | None, typer.Option(help="Instead of --devices: be done in this time.")] = None,
    cpus: Annotated[
        int | None,
        typer.Option(min=1, help="Cores there are, for decoding and actors (default: what is needed; cpu: --devices)."),
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Instead of SOURCE: costs as a run in this DIR measured them.")
    ] = None,
    features: Annotated[str, typer.Option(help="As for embed.")] = "cls,pooled",
    labels: Annotated[int, typer.Option(min=0, help="As for embed.")] = 0,
    feature_dtype: Annotated[str, typer.Option(help="float32 or float16 in the output.")] = "float32",
    decode: Annotated[str, typer.Option(help="exact or fast, as for embed.")] = "exact",
    image_size: AsForEmbed = None,
    revision: AsForEmbed = None,
    include: SeveralAsForEmbed = None,
    exclude: SeveralAsForEmbed = None,
    uri_column: AsForEmbed = None,
    image_column: AsForEmbed = None,
    storage_options: Options = None,
    as_json: AsJson = False,
) -> int:
    """Say how many CPUs a GPU needs, how long a job takes, and how much memory and output, with the arithmetic."""
    import json

    from pipeline.planning import make_plan

    options = parse_options(storage_options)
    count = parse_count(images)
    if hours is not None and not 0 < hours < float("inf"):
        raise SpecError(f"--hours {hours:g}: expected a number above 0, such as 8 or 0.5")
    if run is not None:
        from pipeline.sampling import from_run

        others = [*(["SOURCE"] if source else []), *filter(None, [options_given(context, *_OF_A_SOURCE)])]
        if others:
            raise SpecError(f"--run brings its own measurements: leave out {', '.join(others)}")
        sample, chosen = from_run(run, options)
    else:
        values = {"features": features, "labels": labels}
        values |= {"feature_dtype": feature_dtype, "decode": decode, "storage_options": options}
        chosen = _device(device)
        values |= sampled_values(context.params)
        sample = _sample(source, model, values)
    made = make_plan(count, sample.costs, chosen, devices=devices, hours=hours, cpus=cpus)
    if as_json:
        emit(json.dumps({"model": sample.model, "origin": sample.origin, "steps": [s._asdict() for s in made.steps]}))
    else:
        _show(count, sample, chosen, made)
    return 0


def _sample(source: list[str] | None, model: str | None, values: dict[str, Any]) -> "Sample":
    from pipeline.sampling import from_source
    from schemas.spec import build_spec

    if not source or not model:
        raise SpecError("a plan needs SOURCE and --model, or --run DIR: patchstream plan SOURCE --model M --images N")
    return from_source(build_spec({"sources": source, "model": model, "out": "memory://plan", **values}))


def _device(name: str) -> "Device":
    from pipeline.planning import DEVICES

    if name not in DEVICES:
        raise SpecError(f"--device {name}: choose one of {', '.join(DEVICES)}, or measure with --run DIR")
    return DEVICES[name]


def parse_count(text: str) -> int:
    """A number of images: `250000`, `250_000`, `250,000` or `1e9`. Raises SpecError for anything else."""
    try:
        value = float(text.replace(",", "").replace("_", ""))
        if value != int(value):
            raise ValueError
        return int(value)
    except (ValueError, OverflowError):
        raise SpecError(f"--images {text}: expected a whole number, such as 250000 or 1e9") from None


def _show(count: int, sample: "Sample", device: "Device", made: "Plan") -> None:
    costs = sample.costs
    emit(f"{count:,} images, {sample.model}, on {device.name}")
    emit(f"from {sample.origin}: {costs.file_bytes / 1e3:,.1f} kB and {costs.decode_s * 1e3:.3g} ms of decoding each\n")
    rows = [(step.name, readable(step.value, step.unit), step.arithmetic) for step in made.steps]
    left, middle = (max(len(row[i]) for row in rows) for i in (0, 1))
    for name, value, arithmetic in rows:
        emit(f"{name:<{left}}  {value:>{middle}}   = {arithmetic}")


def readable(value: float, unit: str) -> str:
    """`1.5 TB`, `3.2 days`, `1,234 cores`: at most four digits that matter."""
    for size, name in _SCALES.get(unit, ()):
        if value >= size:
            return f"{value / size:,.4g} {name}"
    number = f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.4g}"
    return f"{number} {unit}".strip()


COMMANDS: dict[str, Callable[..., Any]] = {"plan": plan}

"""`benchmark`: one minute on this machine that says what a job will do here, what holds it up, and what to change."""

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.options import (
    AsForEmbed,
    AsJson,
    Options,
    SeveralAsForEmbed,
    Verbose,
    batch_size_of,
    nested_values,
    parse_options,
    sampled_values,
)
from jobs.output import emit
from schemas.errors import SpecError

if TYPE_CHECKING:
    from pipeline.advice import Measured, Shape
    from pipeline.placement import Placement
    from pipeline.rehearsal import Rehearsal
    from schemas.spec import JobSpec

# A job of a few images is placed on fewer actors; nobody measures for one.
_PLACED_ROWS = 1_000_000


def benchmark(
    context: typer.Context,
    source: Annotated[list[str], typer.Argument(help="As for embed; a sample of it is measured.")],
    model: Annotated[str, typer.Option(help="A folder, an object-store prefix or a hub name.")],
    features: Annotated[str, typer.Option(help="As for embed.")] = "cls,pooled",
    labels: Annotated[int, typer.Option(min=0, help="As for embed.")] = 0,
    dtype: Annotated[str, typer.Option(help="As for embed.")] = "auto",
    batch_size: Annotated[str, typer.Option(help="As for embed.")] = "auto",
    decode: Annotated[str, typer.Option(help="exact or fast, as for embed.")] = "exact",
    image_size: AsForEmbed = None,
    revision: AsForEmbed = None,
    include: SeveralAsForEmbed = None,
    exclude: SeveralAsForEmbed = None,
    uri_column: AsForEmbed = None,
    image_column: AsForEmbed = None,
    actors: AsForEmbed = None,
    gpus_per_actor: Annotated[float, typer.Option(help="As for embed.")] = 0.0,
    address: AsForEmbed = None,
    cluster_wait: Annotated[float, typer.Option(help="As for embed.")] = 0.0,
    seconds: Annotated[float, typer.Option(min=5, help="About how long to measure, start-up of Ray apart.")] = 45.0,
    scratch: Annotated[
        str | None,
        typer.Option(help="Where to try the whole job, uploads apart; removed again. All nodes must see it."),
    ] = None,
    storage_options: Options = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> int:
    """Measure each stage apart and all together for about a minute; name the bottleneck and what to change."""
    from jobs.console import native_messages_aside
    from schemas.spec import build_spec

    values: dict[str, Any] = {
        "sources": source,
        "model": model,
        "out": "memory://benchmark",
        "features": features,
        "labels": labels,
        "dtype": dtype,
        "batch_size": batch_size_of(batch_size),
        "decode": decode,
        "gpus_per_actor": gpus_per_actor,
        "storage_options": parse_options(storage_options),
    }
    spec = build_spec(values | sampled_values(context.params) | nested_values({"actors": actors}))
    with native_messages_aside(verbose):
        measured, shape, placement, together = look(spec, seconds, address, cluster_wait, scratch, verbose)
    found = result(measured, shape, placement, together)
    if as_json:
        import json

        emit(json.dumps(found))
    else:
        show(found, measured, shape)
    return 0


def look(
    spec: "JobSpec", seconds: float, address: str | None, wait_s: float, scratch: str | None, verbose: bool
) -> "tuple[Measured, Shape, Placement, Rehearsal]":
    """Stages apart in a worker placed like an actor, then the whole job; half of `seconds` each."""
    from cluster.remote import call
    from cluster.session import ray_session
    from jobs.run import first_bundles
    from pipeline.advice import Shape, ideal_rate, stage_costs
    from pipeline.opening import resolve_job
    from pipeline.predicting import place_job
    from pipeline.preflight import measure
    from pipeline.rehearsal import rehearse, rows_to_rehearse
    from pipeline.staff import actors_on

    resolved = resolve_job(spec)
    connect = partial(ray_session, address, verbose=verbose, bundles=first_bundles(spec), wait_s=wait_s)
    began = time.monotonic()
    with connect() as machines:
        # Who waits for machines waits longer than anything takes to start.
        connected_s = 0.0 if wait_s else time.monotonic() - began
        if machines.nodes > 1 and scratch is None:
            raise SpecError(
                f"the cluster has {machines.nodes} nodes, and all must see the folder in which the whole job is tried: "
                "give --scratch s3://BUCKET/PREFIX, or a folder that they share"
            )
        placement = place_job(resolved, machines, _PLACED_ROWS)
        cpus = 1.0 if spec.gpus_per_actor else placement.actor_cpus
        measured = call(
            measure, cpus=cpus, gpus=spec.gpus_per_actor, resolved=resolved, placement=placement, seconds=seconds / 2
        )
        shared_by = actors_on(1, spec.gpus_per_actor) if spec.gpus_per_actor else 0
        used = min(machines.gpus, -(-placement.actors.max // shared_by)) if shared_by else 0.0
        booked = placement.actor_cpus * min(placement.actors.max, used * shared_by)
        shape = Shape(int(machines.cpus), used, placement.lanes, spec.decode, booked)
        expected = ideal_rate(stage_costs(measured, shape), shape)
        images, tail = rows_to_rehearse(resolved, machines, placement, expected * seconds / 2)
        together = rehearse(spec, connect, images=images, listed=measured.listed, tail=tail, scratch=scratch)
    if together.images_per_s <= 0:
        raise SpecError(
            f"--seconds {seconds:g}: all {together.images} images of the rehearsal came at once, and a rate is taken "
            "between two batches; give more --seconds"
        )
    return measured, shape, placement, together._replace(startup_s=connected_s + together.startup_s)


def result(measured: "Measured", shape: "Shape", placement: "Placement", together: "Rehearsal") -> dict[str, Any]:
    """All figures as JSON-ready values; rates in images/s."""
    from pipeline.advice import advise, bottleneck, cpus_for_a_gpu, doubts, ideal_rate, stage_costs

    costs = stage_costs(measured, shape)
    ideal = ideal_rate(costs, shape)
    return {
        "cpus": shape.cpus,
        "gpus": shape.gpus,
        "actors": placement.actors.max,
        "calls": placement.actor_calls,
        "threads": placement.threads,
        "batch_size": placement.batch_size,
        "dtype": measured.forward[0].dtype,
        "decode": shape.decode,
        "stages": {cost.name: {"core_ms": cost.core_s * 1e3, "images_per_s_alone": cost.alone} for cost in costs},
        "ideal_images_per_s": ideal,
        "together_images": together.images,
        "predicted_images_per_s": together.images_per_s,
        "startup_s": together.startup_s,
        "bottleneck": bottleneck(costs, shape),
        "cpus_for_each_gpu": cpus_for_a_gpu(measured, shape) if shape.gpus else None,
        "advice": [*doubts(together.images_per_s / ideal), *advise(measured, shape)],
        "measured": measured._asdict() | {"forward": [item._asdict() for item in measured.forward]},
    }


def show(found: dict[str, Any], measured: "Measured", shape: "Shape") -> None:
    """The same for a person."""
    from pipeline.sampling import LISTED

    where = f"{shape.cpus} CPUs" + (f" and {shape.gpus:g} GPUs" if shape.gpus else "")
    actors = f"{found['actors']} actor{'s' * (found['actors'] > 1)} of {found['calls']} calls"
    emit(f"{where}, {actors}, batches of {found['batch_size']}, {found['dtype']}, {found['decode']}")
    alone = ", the first of the sources, which alone were looked at" if measured.listed >= LISTED else ""
    emit(f"{measured.sampled} of {measured.listed:,} images listed{alone}, {measured.file_bytes / 1e3:,.1f} kB each\n")
    emit(f"{'stage':<12}{'core-ms an image':>18}{'images/s alone':>18}")
    for name, cost in found["stages"].items():
        emit(f"{name:<12}{cost['core_ms']:>18,.2f}{cost['images_per_s_alone']:>18,.1f}")
    share = found["predicted_images_per_s"] / found["ideal_images_per_s"]
    emit(f"{'ideal':<12}{'':>18}{found['ideal_images_per_s']:>18,.1f}   if no stage ever waited")
    emit(f"{'together':<12}{'':>18}{found['predicted_images_per_s']:>18,.1f}   {share:.0%} of it, measured on "
         f"{found['together_images']} images\n")  # fmt: skip
    emit(f"{'precision':<12}{'batch':>18}{'ms an image':>18}")
    for item in measured.forward:
        emit(f"{item.dtype:<12}{item.batch_size:>18}{item.image_s * 1e3:>18,.2f}")
    emit(f"\nexpect {found['predicted_images_per_s']:,.1f} images/s after {found['startup_s']:.0f} s of start-up, "
         "Ray's included; before that the model is read and the images are listed. Most of the time of an image goes "
         f"to: {found['bottleneck']}")  # fmt: skip
    for sentence in found["advice"]:
        emit(f"  - {sentence}")


COMMANDS: dict[str, Callable[..., Any]] = {"benchmark": benchmark}

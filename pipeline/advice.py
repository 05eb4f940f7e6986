"""From measured costs of the stages to the bottleneck, the rate to expect, and what to change. Arithmetic only."""

import statistics
from typing import NamedTuple

from pipeline.models.precision import LEAST_MEDIAN
from pipeline.placement import MOST_WRITES

# Below these gains a change is not worth a word; measurements on a machine in use scatter by a few percent.
WORTH = 1.08
LIKE_ENOUGH = 0.995
# A rehearsal of some seconds scatters by a few percent.
MOST_OF_IDEAL = 1.1


class Forward(NamedTuple):
    """Seconds of `threads` threads (or of one GPU, `threads` 0) for one image in a batch of `batch_size`.

    `cosines`: of the first feature to that in the precision of the job, image by image; empty where it is that one.
    """

    dtype: str
    batch_size: int
    threads: int
    image_s: float
    cosines: list[float]


class Measured(NamedTuple):
    """Costs of one image, stage by stage; `forward[0]` is how the job would run.

    `fetch_s` is the wall time for one image with `concurrency` reads in flight, the others are core-seconds.
    """

    sampled: int
    listed: int
    failed: int
    file_bytes: float
    fetch_s: float
    fetch_core_s: float
    decode_core_s: dict[str, float]
    fast_cosines: list[float]
    transfer_core_s: float
    forward: list[Forward]
    write_s: float


class Shape(NamedTuple):
    """How the job would be placed: cores, GPUs that the actors compute on (0: on the cores), `lanes` in
    which blocks are computed side by side. `actor_cpus`: cores that all actors on GPUs book, where nothing is decoded;
    on the cores they are shared."""

    cpus: int
    gpus: float
    lanes: int
    decode: str
    actor_cpus: float = 0.0

    @property
    def decoding_cpus(self) -> float:
        """Cores that decoding tasks run on."""
        return self.cpus - self.actor_cpus


class StageCost(NamedTuple):
    """`core_s` core-seconds of an image, and how many images/s the stage could do with all it may use."""

    name: str
    core_s: float
    alone: float


def stage_costs(measured: Measured, shape: Shape) -> list[StageCost]:
    """The stages in the order of the flow, each as if it had the machine to itself."""
    forward = measured.forward[0]
    decode_s = measured.decode_core_s[shape.decode]
    forward_core_s = forward.image_s * forward.threads
    by_core = {
        "decode": (decode_s, shape.decoding_cpus),
        "transfer": (measured.transfer_core_s, shape.cpus),
        "write": (measured.write_s, min(shape.cpus, MOST_WRITES)),
    }
    costs = {name: StageCost(name, each, cores / max(each, 1e-9)) for name, (each, cores) in by_core.items()}
    # One decoding task fetches for itself, and there are as many side by side as cores for them.
    fetching = shape.decoding_cpus / max(measured.fetch_s, 1e-9)
    # Actors that share a GPU share its rate.
    on_gpu = shape.gpus / forward.image_s
    # Cores on which no actor has a thread do not compute.
    computing = min(shape.cpus, shape.lanes * forward.threads)
    predict = StageCost("forward", forward_core_s, on_gpu if shape.gpus else computing / forward_core_s)
    fetch = StageCost("fetch", measured.fetch_core_s, fetching)
    return [fetch, costs["decode"], costs["transfer"], predict, costs["write"]]


def ideal_rate(costs: list[StageCost], shape: Shape) -> float:
    """Images/s if no stage ever waited: the cores divided by what an image takes of them, or the slowest stage."""
    on_cores = sum(cost.core_s for cost in costs)
    slowest = min(cost.alone for cost in costs)
    return min(slowest, shape.cpus / max(on_cores, 1e-9))


def bottleneck(costs: list[StageCost], shape: Shape) -> str:
    """The stage that decides the rate: the slowest alone, or, where all share the cores, the one that takes most."""
    return _waited_for(costs, shape) or max(costs, key=lambda cost: cost.core_s).name


def _waited_for(costs: list[StageCost], shape: Shape) -> str | None:
    """The stage that is slowest alone; None where the cores that all share have no more time."""
    slowest = min(costs, key=lambda cost: cost.alone)
    on_cores = sum(cost.core_s for cost in costs)
    return None if slowest.alone > shape.cpus / max(on_cores, 1e-9) else slowest.name


def advise(measured: Measured, shape: Shape) -> list[str]:
    """Sentences on what to change, most useful first; one that says so when nothing is worth it."""
    costs = stage_costs(measured, shape)
    held_up, waited_for = bottleneck(costs, shape), _waited_for(costs, shape)
    found = [
        # Where cores starve GPUs, more of them help whichever stage takes most of their time.
        *(_about_cpus(costs, shape, waited_for) or _about_writing(costs, held_up)),
        *_about_fetching(measured, waited_for),
        *_about_precision(measured, costs, shape),
        *_about_batch_size(measured, costs, shape),
        *_about_decoding(measured, shape),
    ]
    return found or [f"nothing to change: {held_up} is what the time goes to, and no option tried here makes it faster"]


def doubts(share: float) -> list[str]:
    """What goes before all advice where a job ran at a `share` of the ideal that cannot be."""
    if share > MOST_OF_IDEAL:
        return [
            f"the job ran at {share:.0%} of what its stages would allow: the machine was busier while they were "
            "measured alone. Repeat it before you take what follows"
        ]
    return []


def cpus_for_a_gpu(measured: Measured, shape: Shape) -> float:
    """Cores that keep one GPU (one actor) busy: all core-seconds of an image times the images of a second, or those of
    decoding beside the cores that its actors book."""
    return _cpus_for(1 / measured.forward[0].image_s, stage_costs(measured, shape), shape.actor_cpus / shape.gpus)


def _cpus_for(rate: float, costs: list[StageCost], actor_cpus: float) -> float:
    decode_s = next(cost.core_s for cost in costs if cost.name == "decode")
    return rate * max(sum(cost.core_s for cost in costs if cost.name != "forward"), decode_s + actor_cpus / rate)


def _about_cpus(costs: list[StageCost], shape: Shape, waited_for: str | None) -> list[str]:
    if not shape.gpus or waited_for not in (None, "decode"):
        return []
    forward = next(cost for cost in costs if cost.name == "forward")
    needed = _cpus_for(forward.alone, costs, shape.actor_cpus)
    actors = f", of which the actors have {shape.actor_cpus:g}," if shape.actor_cpus else ""
    return [
        f"the cores, busiest with {bottleneck(costs, shape)}, starve the GPUs: {shape.cpus} CPUs{actors} feed "
        f"{ideal_rate(costs, shape):,.0f} of the {forward.alone:,.0f} images/s they could do; have {needed:,.0f} CPUs, "
        f"{needed / shape.gpus:,.1f} for each GPU"
    ]


def _about_fetching(measured: Measured, waited_for: str | None) -> list[str]:
    if waited_for != "fetch":
        return []
    rate = measured.file_bytes / measured.fetch_s / 1e6
    return [
        f"the source is what is waited for ({rate:,.1f} MB/s for each decoding task): run nearer to it, "
        "raise fetch.concurrency in --config, or pack small files into tar shards"
    ]


def _about_writing(costs: list[StageCost], held_up: str) -> list[str]:
    if held_up != "write":
        return []
    alone = next(cost.alone for cost in costs if cost.name == "write")
    return [
        f"writing is what is waited for ({alone:,.0f} images/s at most; a job writes no more than {MOST_WRITES} parts "
        "at once): ask for fewer --features, store vectors with --feature-dtype float16 (patches always are), or run "
        "several jobs on the same --out, each with its --shard I/N on machines of its own"
    ]


def _about_precision(measured: Measured, costs: list[StageCost], shape: Shape) -> list[str]:
    mine = measured.forward[0]
    found = []
    for other in measured.forward[1:]:
        gain = _gain(measured, other, costs, shape)
        if other.dtype != mine.dtype and other.cosines and gain >= WORTH:
            if statistics.median(other.cosines) < LEAST_MEDIAN:
                continue  # a job in it would stop before its first row
            found.append(
                f"--dtype {other.dtype}: {gain:.2f} times the images/s; features then have a cosine of "
                f"{statistics.median(other.cosines):.5f} (least {min(other.cosines):.5f}) to those in {mine.dtype}"
            )
    return found


def _about_batch_size(measured: Measured, costs: list[StageCost], shape: Shape) -> list[str]:
    mine = measured.forward[0]
    same = [other for other in measured.forward if other.dtype == mine.dtype]
    best = min(same, key=lambda other: other.image_s)
    gain = _gain(measured, best, costs, shape)
    if best.batch_size == mine.batch_size or gain < WORTH:
        return []
    return [f"--batch-size {best.batch_size}: {gain:.2f} times the images/s of {mine.batch_size}"]


def _about_decoding(measured: Measured, shape: Shape) -> list[str]:
    if shape.decode == "fast" or not measured.fast_cosines:
        return []
    now = ideal_rate(stage_costs(measured, shape), shape)
    then_shape = shape._replace(decode="fast")
    gain = ideal_rate(stage_costs(measured, then_shape), then_shape) / now
    likeness = statistics.median(measured.fast_cosines)
    if gain < WORTH:
        return []
    effect = f"features then have a cosine of {likeness:.5f} (least {min(measured.fast_cosines):.5f}) to exact ones"
    if likeness < LIKE_ENOUGH:
        return [f"--decode fast would give {gain:.2f} times the images/s, but {effect}: that is far off, stay exact"]
    return [f"--decode fast: {gain:.2f} times the images/s; {effect}"]


def _gain(measured: Measured, other: Forward, costs: list[StageCost], shape: Shape) -> float:
    changed = measured._replace(forward=[other])
    return ideal_rate(stage_costs(changed, shape), shape) / ideal_rate(costs, shape)

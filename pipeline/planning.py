"""How many machines a job needs, how long it takes and what it leaves behind: arithmetic on costs for one image.

Nothing is measured here (`sampling.py` does that), and every figure carries the arithmetic that it comes from.
"""

import math
from typing import NamedTuple

from pipeline.placement import Placement, place
from pipeline.sinks.compaction import FULL_FRACTION
from schemas.errors import SpecError
from schemas.machines import Machines
from schemas.spec import SinkSpec

MAX_IMAGES = 1_000_000_000
SINK = SinkSpec()
SHARD_IMAGES = 100_000_000
# Blocks that Ray Data keeps for each decoding task (one being made, one waiting) and each call of an actor (two given
# out, one result), before back-pressure stops the upstream stage.
BLOCKS_PER_TASK = 2
BLOCKS_PER_CALL = 3
# Ray gives its object store this share of a machine's memory.
OBJECT_STORE_SHARE = 0.3
WORKER_BYTES = 1 << 30
# Of ViT-B/16 at 224 it is 35 GFLOP; ViT-S has 9.
SMALL_FLOP = 20e9


class Device(NamedTuple):
    """What runs the model. `tflops` is the dense peak in the precision of `auto`; `share` of it reaches the result."""

    name: str
    tflops: float
    share: float = 0.5
    is_gpu: bool = True


# Dense 16-bit tensor peaks from NVIDIA's data sheets. CPU: what one core was measured to sustain on ViT-B/16.
DEVICES = {
    "t4": Device("T4", 65, 0.4),
    "a10g": Device("A10G", 70),
    "l4": Device("L4", 121),
    "l40s": Device("L40S", 362),
    "a100": Device("A100", 312),
    "h100": Device("H100", 989),
    "h200": Device("H200", 989),
    "cpu": Device("core, float32", 0.09, 1.0, False),
    "cpu-amx": Device("core with AMX, bfloat16", 0.33, 1.0, False),
}


class Costs(NamedTuple):
    """For one image: bytes read, core-seconds of decoding, uint8 bytes between the stages, bytes of output, and of what
    `search` keeps on its disk.

    `model_flop` are floating-point operations of a forward pass (two for a multiply and add). `predict_s`, where it
    was measured, are seconds of one device (of a core with decoding) and win over the estimate from `model_flop`.
    `model_bytes`: memory that an actor books, None where it is not known.
    """

    file_bytes: float
    decode_s: float
    pixel_bytes: int
    output_bytes: float
    model_flop: float
    predict_s: float | None = None
    uri_bytes: float = 80.0
    search_bytes: int = 0
    model_bytes: int | None = None


class Step(NamedTuple):
    """One figure: its name, value in `unit`, and the arithmetic in words."""

    name: str
    value: float
    unit: str
    arithmetic: str


class Plan(NamedTuple):
    """Figures in the order in which each follows from those before it."""

    steps: tuple[Step, ...]

    def value(self, name: str) -> float:
        """The figure called `name`."""
        return next(step.value for step in self.steps if step.name == name)


def row_bytes(features: int, *, labels: int, uri_bytes: float) -> float:
    """Bytes of a row of `images/`: `features` do not compress; a label takes about 10, digest and facts about 75."""
    return features + labels * 10 + 75 + uri_bytes / 2


def make_plan(
    images: int,
    costs: Costs,
    device: Device,
    *,
    devices: int | None = None,
    hours: float | None = None,
    cpus: int | None = None,
) -> Plan:
    """Plan for `images` on `devices` of a kind (one), or on as many as finish in `hours`; `cpus`: cores there are, for
    decoding and actors. Where cores are the devices it is their number.

    Raises SpecError for fewer than 1 or more than MAX_IMAGES images, for times and counts that are not positive, and
    for cores whose number is given twice.
    """
    if not 1 <= images <= MAX_IMAGES:
        raise SpecError(f"--images {images}: between 1 and {MAX_IMAGES:,}; split a larger job by source")
    if cpus is not None and not device.is_gpu:
        devices = _cores(cpus, devices, hours)
    devices = 1 if devices is None else devices
    if devices < 1 or (hours is not None and hours <= 0) or (cpus is not None and cpus < 1):
        raise SpecError("--devices, --hours and --cpus must be positive")
    speed = _speed(costs, device)
    rate = speed[-1].value
    if hours is not None:
        devices = math.ceil(images / (rate * hours * 3600))
    fleet = _fleet(costs, device, rate, devices, hours, images)
    if cpus is not None and device.is_gpu:
        fleet[-1] = Step("cores", cpus, "cores", f"as asked for; {fleet[-1].value:,.0f} keep the devices busy")
    cores = fleet[-1].value if cpus is None else cpus
    placement = _placement(images, costs, device, devices, cores)
    actors = placement.actor_cpus * placement.actors.max if device.is_gpu else 0.0
    throughput = _throughput(images, costs, device, rate, devices, cores, actors)
    return Plan(
        (
            *speed,
            *fleet,
            *throughput,
            *_memory(costs, placement, math.ceil(cores - actors)),
            *_traces(images, costs, throughput[0].value),
        )
    )


def _cores(cpus: int, devices: int | None, hours: float | None) -> int:
    """Devices, where each is a core."""
    if hours is not None or devices not in (None, cpus):
        other = "--devices" if hours is None else "--hours"
        raise SpecError(
            f"--cpus {cpus} with {other}: each device is a core here, so both say how many; give one of them"
        )
    return cpus


def _speed(costs: Costs, device: Device) -> list[Step]:
    if costs.predict_s is not None:
        text = f"1 ÷ {costs.predict_s:.3g} s measured on {device.name}"
        return [Step("images/s a device", 1 / costs.predict_s, "images/s", text)]
    flop = Step("forward pass", costs.model_flop / 1e9, "GFLOP", "2 × multiplications of the network")
    sustained = device.tflops * device.share
    text = f"{device.name}: {device.tflops:g} TFLOP/s × {device.share:g} ÷ {costs.model_flop / 1e9:.4g} GFLOP"
    if device.is_gpu and costs.model_flop < SMALL_FLOP:
        text += "; at most: so small a network does not fill it"
    rate = sustained * 1e12 / costs.model_flop
    if not device.is_gpu:
        rate = 1 / (1 / rate + costs.decode_s)
        text = f"1 ÷ ({costs.model_flop / sustained / 1e12:.3g} s forward + {costs.decode_s:.3g} s decode), one core"
    return [flop, Step("images/s a device", rate, "images/s", text)]


def _fleet(costs: Costs, device: Device, rate: float, devices: int, hours: float | None, images: int) -> list[Step]:
    given = "as asked for"
    if hours is not None:
        given = f"{images:,} ÷ ({rate:,.1f} images/s × {hours:g} h × 3600), rounded up"
    count = Step("devices", devices, "", given)
    if not device.is_gpu:
        return [count, Step("cores", devices, "cores", "each core decodes and predicts")]
    per_gpu = rate * costs.decode_s
    text = f"{rate:,.1f} images/s × {costs.decode_s:.3g} core-seconds to decode"
    return [
        Step("CPUs for each device", per_gpu, "cores", text),
        count,
        Step(
            "cores",
            math.ceil(per_gpu * devices) + devices,
            "cores",
            f"{per_gpu:.3g} × {devices:,}, rounded up, and one for each actor",
        ),
    ]


def _throughput(
    images: int, costs: Costs, device: Device, rate: float, devices: int, cores: float, actors: float
) -> list[Step]:
    """`actors`: the `cores` that they book, on which nothing is decoded."""
    predict = rate * devices
    total, text = predict, f"{rate:,.1f} × {devices:,} devices"
    if device.is_gpu and (cores - actors) / costs.decode_s < predict:
        total = (cores - actors) / costs.decode_s
        text = (
            f"({cores:,.0f} cores - {actors:g} of actors) ÷ {costs.decode_s:.3g} s: decoding holds it up, "
            f"devices could do {predict:,.0f}"
        )
    return [
        Step("throughput", total, "images/s", text),
        Step("time", images / total / 3600, "h", f"{images:,} ÷ {total:,.1f} images/s"),
        Step("read", images * costs.file_bytes, "bytes", f"{images:,} × {costs.file_bytes:,.0f} bytes a file"),
        Step(
            "network", total * costs.file_bytes * 8 / 1e9, "Gbit/s", f"{total:,.1f} × {costs.file_bytes:,.0f} bytes × 8"
        ),
    ]


def _placement(images: int, costs: Costs, device: Device, devices: int, cores: float) -> Placement:
    return place(
        Machines(cpus=cores, gpus=devices if device.is_gpu else 0, object_store_bytes=0),
        rows=images,
        actors=None,
        gpus_per_actor=float(device.is_gpu),
        batch_size=None,
        pixel_bytes=costs.pixel_bytes,
        model_bytes=costs.model_bytes or 0,
        image_gflop=costs.model_flop / 1e9,
        output_bytes=int(costs.output_bytes),
    )


def _memory(costs: Costs, placement: Placement, tasks: int) -> list[Step]:
    block = placement.block_bytes
    calls = placement.actor_calls * placement.actors.max
    blocks = BLOCKS_PER_TASK * tasks + BLOCKS_PER_CALL * calls
    store = blocks * block
    text = f"({BLOCKS_PER_TASK} × {tasks:,} tasks + {BLOCKS_PER_CALL} × {calls:,} calls) × {block / 2**20:.1f} MiB"
    memory = store / OBJECT_STORE_SHARE + tasks * WORKER_BYTES
    needs = f"object store ÷ {OBJECT_STORE_SHARE:g} + {tasks:,} workers × 1 GiB"
    if costs.model_bytes is None:
        needs += "; without that of the actors, which hold the model and which a run does not record"
    else:
        memory += placement.actors.max * costs.model_bytes
        needs += f" + {placement.actors.max:,} actors × {costs.model_bytes / 2**30:,.2f} GiB"
    return [
        Step("object store", store, "bytes", text),
        Step("memory", memory, "bytes", f"all machines: {needs}"),
    ]


def _traces(images: int, costs: Costs, rate: float) -> list[Step]:
    output = images * costs.output_bytes
    part, why = min(SINK.part_bytes, rate * costs.output_bytes * SINK.commit_s), "as committed"
    if part < SINK.compact_bytes * FULL_FRACTION:
        part, why = SINK.compact_bytes, "after compaction"
    search = images * costs.search_bytes
    text = f"on the disk of whoever searches, for one feature: {images:,} × {costs.search_bytes:,} bytes"
    return [
        Step("output", output, "bytes", f"{images:,} × {costs.output_bytes:,.0f} bytes a row"),
        Step("parts", math.ceil(output / part), "files", f"output ÷ {part / 2**20:,.0f} MiB {why}"),
        Step("manifest", images * (costs.uri_bytes / 2 + 16), "bytes", f"{images:,} × (half the address + 16 bytes)"),
        *([Step("vectors for search", search, "bytes", text)] if search else []),
        Step("shards", math.ceil(images / SHARD_IMAGES), "jobs", f"--shard I/N, one for each {SHARD_IMAGES:,} images"),
    ]

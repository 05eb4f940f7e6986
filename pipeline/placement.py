"""How large a batch, a block and a task, and how much may be on its way: pure arithmetic on what the cluster has."""

import logging
from collections.abc import Iterator
from typing import NamedTuple

from pipeline.staff import Staff, actors_on, on_cpus, on_gpus
from schemas.errors import ClusterError
from schemas.machines import Machines
from schemas.values import ActorRange

log = logging.getLogger(__name__)

_BLOCK_BYTES = 8 << 20
# Large enough for 256 images of 384 × 384 pixels or the patch features of a ViT-L at 224.
_LARGEST_BLOCK_BYTES = 128 << 20
_TASK_ROWS = 1024
# As many again may follow where they shrink towards the end.
_MAX_LONG_TASKS = 10_000
_TASKS_LEFT_EACH = 2
_CPU_BLOCK_S = 2.0
# What a batch of the automatic size may take one thread: until then nothing of it can be committed.
_CPU_BATCH_S = 10.0
_GFLOPS_A_THREAD = 50.0
# What all actors together may have under way with a Triton server: one of two cores still answers within the usual
# deadline of 60 s.
_SERVED_GFLOP = 6000.0
# Blocks on their way from stage to stage. Ray Data reckons with two for each decoding task that runs, and grants these
# three eighths of the limit; those that wait for an actor come out of another part of it.
_STREAM_BYTES = 512 << 20
_BLOCKS_A_DECODER = 6
_BLOCKS_A_LANE = 8
# Parts of one job that are written at once: their blocks are held until they are stored.
MOST_WRITES = 5
# Of a small job, for each call that computes.
_BLOCKS_A_CALL = 4
# What Ray Data may use of the object store.
_STORE_SHARE = 0.5
_UNKNOWN = 1 << 30


class Placement(NamedTuple):
    """Resources for each stage. Of `actors`, `initial_actors` start at once. An actor has `actor_calls` at once, on
    CPUs of `threads` threads each, and computes `actor_lanes` of them side by side: on a GPU calls take turns.
    `batch_size` is the model's; `block_rows` is what travels between stages at once; `task_rows` is the most that a
    decoding task has, of which `decoders` run side by side. `row_bytes` is the room that a row takes between stages, as
    pixels or as features, whichever is larger. `stream_bytes` may be on the way between stages, in the whole
    cluster."""

    actors: ActorRange
    initial_actors: int
    actor_cpus: float
    actor_gpus: float
    actor_memory_bytes: int
    actor_calls: int
    actor_lanes: int
    threads: int
    decode_cpus: float
    batch_size: int
    block_rows: int
    row_bytes: int
    task_rows: int
    decoders: int
    stream_bytes: float

    @property
    def lanes(self) -> int:
        """Blocks that all actors compute side by side."""
        return self.actors.max * self.actor_lanes

    @property
    def block_bytes(self) -> int:
        """What a block takes between stages."""
        return self.block_rows * self.row_bytes

    @property
    def stream_rows(self) -> int:
        """Rows that have to be on their way for every stage to work."""
        return self.block_rows * _blocks(self.lanes, self.decoders)

    def task_sizes(self, rows: int) -> Iterator[int]:
        """Rows of each decoding task, `rows` in all. Towards the end tasks shrink down to one block, so that no core is
        left alone with a long one (guided self-scheduling: Polychronopoulos and Kuck, IEEE Trans. Comput. C-36, 1987).
        """
        left = rows
        while left > 0:
            share = max(1, left // (self.decoders * _TASKS_LEFT_EACH))
            size = min(left, self.task_rows, -(-share // self.block_rows) * self.block_rows)
            yield size
            left -= size


def place(
    machines: Machines,
    *,
    rows: int,
    actors: ActorRange | None,
    gpus_per_actor: float,
    batch_size: int | None,
    pixel_bytes: int,
    model_bytes: int,
    image_gflop: float = 0.0,
    output_bytes: int = 0,
    one_call: bool = False,
    served_batch: int = 0,
    in_flight: int = 1,
) -> Placement:
    """Placement for `rows` images of `pixel_bytes` and `image_gflop` each with a model of `model_bytes`.

    `output_bytes` are those of one image's features: patch features take more room than the pixels. `one_call`: an
    actor on CPUs takes one at a time, of which a server computes `in_flight` batches side by side, each of up to
    `served_batch` images.

    Raises ClusterError when the GPUs asked for are not there, or no machine has the memory for an actor and none may
    come.
    """
    on_gpu, fit = gpus_per_actor > 0, _carried_by_memory(machines, model_bytes, gpus_per_actor)
    staff = on_gpus(machines, actors, gpus_per_actor, fit) if on_gpu else on_cpus(machines, actors, fit, one_call)
    chosen, lanes, cpus = staff.actors, staff.lanes, max(1, int(machines.cpus))
    row_bytes = max(1, pixel_bytes, output_bytes)
    room = _block_room(machines, chosen.max, cpus) / row_bytes
    work = _served_images(chosen.max, image_gflop)
    limits: list[float] = []
    if one_call and not on_gpu:
        limits = [most / in_flight for most in (room, work, rows // (chosen.max * _BLOCKS_A_CALL))]
    elif not on_gpu:
        limits = _cpu_batch_limits(staff, rows, image_gflop)
    usual = 256 if on_gpu else served_batch or 8
    batch = batch_size or _automatic_batch(usual, _LARGEST_BLOCK_BYTES / row_bytes, *limits)
    shares = -(-rows // (batch * in_flight * lanes))
    if actors is None:
        chosen = _useful_actors(chosen, shares)
    # A size that was asked for is kept, however long it takes; no more are under way than there is room for.
    at_once = batch * max(1, min(in_flight, int((room if batch_size else min(room, work)) // batch)))
    blocks = max(1, _BLOCK_BYTES // (row_bytes * at_once)) if pixel_bytes else 4096 // batch
    if on_gpu:
        room = _block_room(machines, chosen.max, cpus) / row_bytes
        batch, blocks = _two_batches(batch, blocks, room, may_halve=batch_size is None)
        at_once = batch
    else:
        # A result can be committed only when its block is done, and a crash must not cost minutes.
        soon = min(room, work) if one_call else _images_in(_CPU_BLOCK_S, staff, image_gflop)
        blocks = max(1, int(min(blocks, soon / at_once)))
    # Small inputs: blocks small enough that every lane gets several.
    block_rows = at_once * max(1, min(blocks, rows // (at_once * chosen.max * lanes * _BLOCKS_A_CALL) or 1))
    return Placement(
        actors=chosen,
        initial_actors=max(chosen.min, min(staff.now, chosen.max, shares)),
        actor_cpus=staff.actor_cpus,
        actor_gpus=gpus_per_actor,
        actor_memory_bytes=model_bytes,
        actor_calls=staff.calls,
        actor_lanes=lanes,
        threads=staff.threads,
        decode_cpus=staff.decode_cpus,
        batch_size=batch,
        block_rows=block_rows,
        row_bytes=row_bytes,
        task_rows=_task_rows(rows, block_rows, cpus),
        decoders=cpus,
        # A limit for the machines of today would hold back those that come. Ray Data's own goes with the store.
        stream_bytes=float("inf")
        if machines.may_grow
        else max(_STREAM_BYTES, block_rows * row_bytes * _blocks(chosen.max * lanes, cpus)),
    )


def _task_rows(rows: int, block_rows: int, cpus: int) -> int:
    """Rows of a decoding task, in whole blocks: several tasks for each core, and not too many of them in all."""
    spread = -(-rows // (cpus * 4))
    least = max(block_rows, min(_TASK_ROWS, spread), -(-rows // _MAX_LONG_TASKS))
    return -(-least // block_rows) * block_rows


def _blocks(lanes: int, decoders: int) -> int:
    """Blocks that may be on their way."""
    return _BLOCKS_A_DECODER * decoders + _BLOCKS_A_LANE * lanes


def _block_room(machines: Machines, lanes: int, decoders: int) -> float:
    """Bytes of the largest block of which as many as there may be fit into the object store, where that is known."""
    fair = machines.object_store_bytes * _STORE_SHARE / _blocks(lanes, decoders)
    return min(_LARGEST_BLOCK_BYTES, fair or float("inf"))


def _carried_by_memory(machines: Machines, model_bytes: int, gpus_per_actor: float) -> int:
    """How many actors the memory of the machines carries. Where it carries none, Ray waits for a larger machine: one,
    with a warning, where such a machine may come; otherwise that would be for ever, and ClusterError is raised."""
    gpus = machines.node_gpus or (0.0,) * len(machines.node_memory)
    known = [(memory, here) for memory, here in zip(machines.node_memory, gpus, strict=True) if here >= gpus_per_actor]
    if not known:
        return _UNKNOWN
    carried = sum(
        min(int(memory // max(1, model_bytes)), actors_on(here, gpus_per_actor) if gpus_per_actor else _UNKNOWN)
        for memory, here in known
    )
    if carried:
        return carried
    lacks = (
        f"an actor with this model needs {model_bytes / 1e9:.1f} GB of memory, the largest machine gives Ray "
        f"{max(known)[0] / 1e9:.1f} GB"
    )
    if not machines.may_grow:
        raise ClusterError(f"{lacks}. Use larger machines, or a smaller model")
    log.warning(
        "%s: the job waits until the cluster has a larger one. If none will come, stop it and use larger machines, or "
        "a smaller model",
        lacks,
    )
    return 1


def _cpu_batch_limits(staff: Staff, rows: int, image_gflop: float) -> list[float]:
    """Images of a batch whose threads are done soon, and of which every lane gets one. Small batches are hardly slower:
    of ViT-B/16 one by one, 1.08 (float32), 1.05 (bfloat16) and 0.89 (int8) times the images/s of eight."""
    return [_images_in(_CPU_BATCH_S, staff, image_gflop), rows // (staff.now * staff.lanes)]


def _useful_actors(chosen: ActorRange, shares: int) -> ActorRange:
    """No more actors than there are shares of the rows: others would only load weights."""
    useful = max(1, min(chosen.max, shares))
    return ActorRange(min=min(chosen.min, useful), max=useful)


def _served_images(actors: int, image_gflop: float) -> float:
    """Images that an actor may have under way with a server that is a slow one."""
    return _SERVED_GFLOP / max(2, actors) / image_gflop if image_gflop else float("inf")


def _images_in(seconds: float, staff: Staff, image_gflop: float) -> float:
    """About how many images one call computes in that time; all, where their cost is not known."""
    return seconds * _GFLOPS_A_THREAD * staff.threads / image_gflop if image_gflop else float("inf")


def _two_batches(batch: int, blocks: int, room: float, *, may_halve: bool) -> tuple[int, int]:
    """Batch size and batches a block on a GPU, where `room` images fit into a block. An actor hides the copies of a
    batch behind the other of its block: one alone has nothing to hide behind, so two halves are better than one whole.
    """
    if 2 * batch <= room:
        return batch, max(blocks, 2)
    if may_halve and batch > 1:
        return batch // 2, 2 * blocks
    return batch, blocks


def _automatic_batch(usual: int, *most: float) -> int:
    """`usual`, or half of it as often as it takes to be no more than each of `most`; at least one."""
    batch = usual
    while batch > max(1, min(most)):
        batch //= 2
    return batch

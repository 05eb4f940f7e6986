"""How many actors, threads and decoding tasks, and how large a block: pure arithmetic on what the cluster has.

On CPUs, actors and decoding tasks share the cores, and Ray's CPU numbers are bookkeeping, not walls. Actors
book three quarters of every core they compute on, decoding tasks a quarter of one: both can always run, the kernel
divides the time, and neither waits for the other.
"""

import logging
import math
from collections.abc import Iterator
from typing import NamedTuple

from schemas.errors import ClusterError
from schemas.machines import Machines
from schemas.spec import ActorRange

log = logging.getLogger(__name__)

_BLOCK_BYTES = 8 << 20
# Large enough for 256 images of 384 × 384 pixels or the patch features of a ViT-L at 224.
_LARGEST_BLOCK_BYTES = 128 << 20
_TASK_ROWS = 1024
# As many again may follow where they shrink towards the end.
_MAX_LONG_TASKS = 10_000
_TASKS_LEFT_EACH = 2
_CPU_BLOCK_S = 2.0
_GFLOPS_A_THREAD = 50.0
_DECODE_CPUS = 0.25
_ACTOR_CPUS_A_CORE = 0.75
# Of an actor, where nothing speaks for another number: they share its weights and what Python it runs.
_CORES_OF_AN_ACTOR = 4
# More calls than this at once would wait for each other's Python.
_MOST_CALLS = 8
# What twice the usual number of cores, or half of it, is thought to cost: this share of the cores may rather idle.
_WORTH_OF_A_DOUBLING = 0.1
# Blocks on their way from stage to stage. Ray Data reckons with two for each decoding task that runs, and grants these
# three eighths of the limit; those that wait for an actor come out of another part of it.
_STREAM_BYTES = 512 << 20
_BLOCKS_A_DECODER = 6
_BLOCKS_A_LANE = 8
# Calls that an actor on a GPU has at once: what one does on the host is hidden behind what the other computes.
_GPU_CALLS = 2
# What Ray Data may use of the object store.
_STORE_SHARE = 0.5
_UNKNOWN = 1 << 30


class Placement(NamedTuple):
    """Resources for each stage. An actor has `actor_calls` at once, on CPUs of `threads` threads each. `batch_size` is
    the model's; `block_rows` is what travels between stages at once; `task_rows` is the most that a decoding task has,
    of which `decoders` run side by side. `stream_bytes` may be on the way between stages, in the whole cluster."""

    actors: ActorRange
    actor_cpus: float
    actor_gpus: float
    actor_memory_bytes: int
    actor_calls: int
    threads: int
    decode_cpus: float
    batch_size: int
    block_rows: int
    task_rows: int
    decoders: int
    stream_bytes: float

    @property
    def actor_lanes(self) -> int:
        """Blocks that an actor computes side by side: on CPUs one for each call; on a GPU calls take turns."""
        return 1 if self.actor_gpus else self.actor_calls

    @property
    def lanes(self) -> int:
        """Blocks that all actors compute side by side."""
        return self.actors.max * self.actor_lanes

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
) -> Placement:
    """Placement for `rows` images of `pixel_bytes` and `image_gflop` each with a model of `model_bytes`.

    `output_bytes` are those of one image's features: patch features take more room than the pixels. `one_call`: an
    actor on CPUs takes one at a time.

    Raises ClusterError when the GPUs asked for are not there, or no machine has the memory for an actor and none may
    come.
    """
    carried = _carried_by_memory(machines, model_bytes, gpus_per_actor)
    cpus = max(1, int(machines.cpus))
    if gpus_per_actor:
        _check_gpus(machines, actors, gpus_per_actor)
        fit = sum(int(gpus / gpus_per_actor) for gpus in machines.node_gpus or (machines.gpus,))
        chosen = actors or ActorRange(min=1, max=max(1, fit))
        calls, lanes, threads = _GPU_CALLS, 1, 0
        actor_cpus, decode_cpus = _book_beside_gpus(machines, min(chosen.max, fit))
    else:
        nodes = [max(1, int(cores)) for cores in machines.node_cpus] or [cpus]
        cores, now = _share(nodes, actors, carried, one_call=one_call)
        calls = lanes = 1 if one_call else _calls(cores)
        threads = cores // calls
        decode_cpus = _DECODE_CPUS
        chosen = actors or ActorRange(min=now, max=now)
        actor_cpus = _book(nodes, cores, now, grows=chosen.max > now)
    row_bytes = max(pixel_bytes, output_bytes)
    batch = batch_size or _automatic_batch(256 if gpus_per_actor else 8, row_bytes)
    if actors is None:
        # More actors than batches would only load weights.
        useful = max(1, min(chosen.max, -(-rows // (batch * lanes))))
        chosen = ActorRange(min=min(chosen.min, useful), max=useful)
    blocks = max(1, _BLOCK_BYTES // max(1, row_bytes * batch)) if pixel_bytes else 4096 // batch
    if gpus_per_actor:
        # An actor hides the copies of a batch behind the other of its block: one alone has nothing to hide behind.
        if 2 * row_bytes * batch <= min(_LARGEST_BLOCK_BYTES, _fair_block(machines, chosen.max, cpus)):
            blocks = max(blocks, 2)
        elif batch_size is None and batch > 1:
            batch, blocks = batch // 2, 2 * blocks
    elif image_gflop:
        # A result can be committed only when its block is done, and a crash must not cost minutes.
        block_images = _CPU_BLOCK_S * _GFLOPS_A_THREAD * threads / image_gflop
        blocks = max(1, min(blocks, int(block_images // batch)))
    # Small inputs: blocks small enough that every lane gets several.
    block_rows = batch * max(1, min(blocks, rows // (batch * chosen.max * lanes * 4) or 1))
    spread = -(-rows // (cpus * 4))
    task_rows = max(block_rows, min(_TASK_ROWS, spread), -(-rows // _MAX_LONG_TASKS))
    return Placement(
        actors=chosen,
        actor_cpus=actor_cpus,
        actor_gpus=gpus_per_actor,
        actor_memory_bytes=model_bytes,
        actor_calls=calls,
        threads=threads,
        decode_cpus=decode_cpus,
        batch_size=batch,
        block_rows=block_rows,
        task_rows=-(-task_rows // block_rows) * block_rows,
        decoders=cpus,
        # A limit for the machines of today would hold back those that come. Ray Data's own goes with the store.
        stream_bytes=float("inf")
        if machines.may_grow
        else max(_STREAM_BYTES, block_rows * row_bytes * _blocks(chosen.max * lanes, cpus)),
    )


def _blocks(lanes: int, decoders: int) -> int:
    """Blocks that may be on their way."""
    return _BLOCKS_A_DECODER * decoders + _BLOCKS_A_LANE * lanes


def _fair_block(machines: Machines, lanes: int, decoders: int) -> float:
    """Bytes of a block of which as many as there may be fit into the object store; no limit where it is not known."""
    return machines.object_store_bytes * _STORE_SHARE / _blocks(lanes, decoders) or float("inf")


def _carried_by_memory(machines: Machines, model_bytes: int, gpus_per_actor: float) -> int:
    """How many actors the memory of the machines carries. Where it carries none, Ray waits for a larger machine: one,
    with a warning, where such a machine may come; otherwise that would be for ever, and ClusterError is raised."""
    gpus = machines.node_gpus or (0.0,) * len(machines.node_memory)
    known = [memory for memory, here in zip(machines.node_memory, gpus, strict=True) if here >= gpus_per_actor]
    if not known:
        return _UNKNOWN
    carried = sum(int(memory // max(1, model_bytes)) for memory in known)
    if carried:
        return carried
    lacks = (
        f"an actor with this model needs {model_bytes / 1e9:.1f} GB of memory, the largest machine gives Ray "
        f"{max(known) / 1e9:.1f} GB"
    )
    if not machines.may_grow:
        raise ClusterError(f"{lacks}. Use larger machines, or a smaller model")
    log.warning(
        "%s: the job waits until the cluster has a larger one. If none will come, stop it and use larger machines, or "
        "a smaller model",
        lacks,
    )
    return 1


def _share(nodes: list[int], actors: ActorRange | None, by_memory: int, *, one_call: bool) -> tuple[int, int]:
    """Cores of a CPU actor, and how many actors nodes of so many cores are to carry as they are now; never more than
    `by_memory`, of which each then has more cores.

    Never more cores than the smallest node has, because an actor lives on one. Four share one copy of the weights and
    one start of Python and torch. Where that leaves cores over, or memory, another number near it does not. Small nodes
    have an actor for each core where an actor takes `one_call`, so that several are under way.
    """
    smallest = min(nodes)
    usual = 1 if one_call and smallest <= _CORES_OF_AN_ACTOR else min(smallest, _CORES_OF_AN_ACTOR)
    if actors is None:

        def worth(cores: int) -> float:
            computing = cores * _carried(nodes, cores, by_memory) / sum(nodes)
            return computing - _WORTH_OF_A_DOUBLING * abs(math.log2(cores / usual))

        cores = max(range(1, smallest + 1), key=worth)
        return cores, _carried(nodes, cores, by_memory)
    now = min(max(_carried(nodes, usual, _UNKNOWN), actors.min), actors.max, by_memory)
    return min(max(1, sum(nodes) // now), smallest), now


def _calls(cores: int) -> int:
    """Calls at once of an actor of so many cores, which it divides among them: as many as may be, since a call of one
    thread waits at no barrier, but with as few cores idle as there can be."""
    return max(range(1, _MOST_CALLS + 1), key=lambda calls: (calls * (cores // calls), calls))


def _carried(nodes: list[int], cores: int, by_memory: int) -> int:
    """Actors of so many cores on nodes of so many, each on one node."""
    return min(sum(there // cores for there in nodes), by_memory)


def _book(nodes: list[int], cores: int, now: int, *, grows: bool) -> float:
    """CPUs that an actor of so many cores books: `now` of them fit on `nodes` with a decoder beside them on each.

    Where their number `grows` when nodes come, one more must not fit where the decoder is to run.
    """
    smallest = min(nodes)
    beside = smallest - _DECODE_CPUS
    most = max(1, -(-now * smallest // sum(nodes)))
    booked = min(cores * _ACTOR_CPUS_A_CORE, beside / most)
    fit = int(beside / booked + 1e-9)
    keeps_out = smallest / (fit + 1) + 1e-3
    return max(booked, keeps_out) if grows and keeps_out * fit <= beside else booked


def _book_beside_gpus(machines: Machines, now: int) -> tuple[float, float]:
    """CPUs that a GPU actor and a decoding task book, for `now` actors: one each where there are plenty.

    Where the actors would book more than half of a node's cores, they book half, or in the end none is left on which
    anything could be decoded, and the job stands still.
    """
    nodes = [max(1.0, cores) for cores in machines.node_cpus] or [max(1.0, machines.cpus)]
    cores, each = min(nodes), -(-max(1, now) // len(nodes))
    return (1.0, 1.0) if 2 * each <= cores else (0.5 * cores / each, min(1.0, 0.5 * cores))


def _automatic_batch(usual: int, row_bytes: int) -> int:
    """Half as often as it takes for a batch to fit into the largest block."""
    batch = usual
    while batch > 1 and batch * row_bytes > _LARGEST_BLOCK_BYTES:
        batch //= 2
    return batch


def _check_gpus(machines: Machines, actors: ActorRange | None, gpus_per_actor: float) -> None:
    needed = gpus_per_actor * (actors.min if actors else 1)
    if machines.gpus < needed:
        asked = f"--gpus-per-actor {gpus_per_actor:g}" + (f" × --actors {actors.min}" if actors else "")
        raise ClusterError(
            f"{asked} needs {needed:g} GPUs, the cluster has {machines.gpus:g} GPUs and {machines.cpus:g} CPUs. "
            "Ask for fewer, add GPU nodes, or leave out --gpus-per-actor to run on CPUs (`retry` has it from the run: "
            "--gpus-per-actor 0)"
        )

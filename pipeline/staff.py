"""How actors and decoding tasks divide the cores and GPUs of the nodes: pure arithmetic.

On CPUs, actors and decoding tasks share the cores, and Ray's CPU numbers are bookkeeping, not walls. Actors
book three quarters of every core they compute on, decoding tasks a quarter of one: both can always run, the kernel
divides the time, and neither waits for the other.
"""

import logging
import math
from typing import NamedTuple

from schemas.errors import ClusterError
from schemas.machines import Machines
from schemas.values import ActorRange

_log = logging.getLogger(__name__)

_DECODE_CPUS = 0.25
_ACTOR_CPUS_A_CORE = 0.75
# Of an actor, where nothing speaks for another number: they share its weights and what Python it runs.
_CORES_OF_AN_ACTOR = 4
# More calls than this at once would wait for each other's Python.
_MOST_CALLS = 8
# Of an actor's cores, for more calls instead of fewer ones of more threads.
_CORES_IN_USE = 0.9
# What twice the usual number of cores, or half of it, is thought to cost: this share of the cores may rather idle.
_WORTH_OF_A_DOUBLING = 0.1
# Calls that an actor on a GPU has at once: what one does on the host is hidden behind what the other computes.
_GPU_CALLS = 2


class Staff(NamedTuple):
    """`actors`, of which there is room for `now`; each has `calls` at once, of `threads` threads on CPUs, and computes
    `lanes` of them side by side. CPUs that an actor and a decoding task book."""

    actors: ActorRange
    now: int
    calls: int
    lanes: int
    threads: int
    actor_cpus: float
    decode_cpus: float


def on_gpus(machines: Machines, actors: ActorRange | None, gpus_per_actor: float, by_memory: int) -> Staff:
    """Actors that have `gpus_per_actor` each, whose calls take turns; memory carries `by_memory` of them. Raises
    ClusterError when the GPUs are not there, or no core to decode on."""
    _check_gpus(machines, actors, gpus_per_actor)
    _check_cores(machines)
    fit = _carried_by_gpus(machines, gpus_per_actor)
    # Ray Data starts the least of them side by side, and any more one after the other.
    chosen = actors or ActorRange(min=max(1, min(fit, by_memory)), max=max(1, fit))
    now = min(chosen.max, fit, by_memory)
    actor_cpus, decode_cpus = _book_beside_gpus(machines, gpus_per_actor, now)
    return Staff(chosen, now, _GPU_CALLS, 1, 0, actor_cpus, decode_cpus)


def actors_on(gpus: float, gpus_per_actor: float) -> int:
    """Actors on a node with so many GPUs, of at most one GPU each: Ray takes the share of an actor from one."""
    return int(gpus) * int(1 / gpus_per_actor + 1e-9)


def on_cpus(machines: Machines, actors: ActorRange | None, by_memory: int, one_call: bool) -> Staff:
    """Actors on the cores, never more of them than `by_memory`; with `one_call` an actor takes one at a time.
    More than there are cores are not made: they would take minutes to start, and memory. Raises ClusterError where
    there is no core."""
    _check_cores(machines)
    nodes = [max(1, int(cores)) for cores in machines.node_cpus] or [max(1, int(machines.cpus))]
    room = sum(nodes)
    if actors and actors.min > room and not one_call and not machines.may_grow:
        _log.warning("--actors %d: there are %d cores and so many actors; more would only wait", actors.min, room)
        actors = ActorRange(min=room, max=room)
    cores, now = _share(nodes, actors, by_memory, one_call=one_call)
    calls = 1 if one_call else _calls(cores)
    chosen = actors or ActorRange(min=now, max=now)
    actor_cpus = _book(nodes, cores, now, grows=chosen.max > now)
    return Staff(chosen, now, calls, calls, cores // calls, actor_cpus, _DECODE_CPUS)


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
    now = min(max(sum(cores // usual for cores in nodes), actors.min), actors.max, by_memory)
    return min(max(1, sum(nodes) // now), smallest), now


def _calls(cores: int) -> int:
    """Calls at once of an actor of so many cores, which it divides among them: as many as may be, since a call of one
    thread waits at no barrier, but with nearly all cores in use."""
    return max(calls for calls in range(1, _MOST_CALLS + 1) if calls * (cores // calls) >= _CORES_IN_USE * cores)


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


def _book_beside_gpus(machines: Machines, gpus_per_actor: float, now: int) -> tuple[float, float]:
    """CPUs that a GPU actor and a decoding task book, for `now` actors: one each where there are plenty.

    Where the actors would book more than half of a GPU node's cores, they book half, or in the end none is left on
    which anything could be decoded, and the job stands still.
    """
    nodes = [max(1.0, cores) for cores in machines.node_cpus or (machines.cpus,)]
    # Where it is not known which nodes have the GPUs, all have some.
    here = [actors_on(gpus, gpus_per_actor) for gpus in machines.node_gpus] or [-(-max(1, now) // len(nodes))] * len(
        nodes
    )
    tight = [
        (cores, min(fit, now)) for cores, fit in zip(nodes, here, strict=True) if fit and 2 * min(fit, now) > cores
    ]
    if not tight:
        return 1.0, 1.0
    return min(0.5 * cores / actors for cores, actors in tight), min(1.0, *(0.5 * cores for cores, _ in tight))


def _carried_by_gpus(machines: Machines, gpus_per_actor: float) -> int:
    return sum(actors_on(gpus, gpus_per_actor) for gpus in machines.node_gpus or (machines.gpus,))


def _check_gpus(machines: Machines, actors: ActorRange | None, gpus_per_actor: float) -> None:
    least = actors.min if actors else 1
    if _carried_by_gpus(machines, gpus_per_actor) < least:
        needed = max(gpus_per_actor * least, math.ceil(least / max(1, actors_on(1, gpus_per_actor))))
        asked = f"--gpus-per-actor {gpus_per_actor:g}" + (f" × --actors {actors.min}" if actors else "")
        asked += ", each from one GPU," if gpus_per_actor < 1 else ""
        wait = "give --cluster-wait 900 where the cluster grows by itself, " if machines.may_grow else ""
        raise ClusterError(
            f"{asked} needs {needed:g} GPUs, the cluster has {machines.gpus:g} GPUs and {machines.cpus:g} CPUs. "
            f"Ask for fewer, add GPU nodes, {wait}or leave out --gpus-per-actor to run on CPUs (`retry` has it from "
            "the run: --gpus-per-actor 0)"
        )


def _check_cores(machines: Machines) -> None:
    if not machines.cpus:
        raise ClusterError(
            "no node of the cluster takes tasks yet (it has 0 CPUs), and a job is laid out for the nodes that it "
            "finds. Give --cluster-wait 900 where the cluster grows by itself, keep some workers there (`min_workers`, "
            "on Kubernetes `minReplicas`), or start them (`ray start` on each)"
        )

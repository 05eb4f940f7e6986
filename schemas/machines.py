"""What a cluster has, as its session tells it to the job."""

from typing import NamedTuple


class Machines(NamedTuple):
    """Totals over all nodes: cores, GPUs, and bytes of memory and of Ray's object store."""

    cpus: float
    gpus: float
    memory_bytes: float
    object_store_bytes: float
    nodes: int = 1
    # Of each node that takes tasks; empty where only the totals are known.
    node_cpus: tuple[float, ...] = ()
    node_gpus: tuple[float, ...] = ()
    node_memory: tuple[float, ...] = ()
    # Of the CPUs of those that were asked, as Linux names them.
    node_cpu_flags: tuple[frozenset[str], ...] = ()
    may_grow: bool = False

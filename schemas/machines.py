"""What a cluster has, as its session tells it to the job."""

import platform
from pathlib import Path
from typing import NamedTuple

# Holds names of variables that every node must have set: how a job that was submitted asks for credentials.
NEEDED_VARIABLES = "PATCHSTREAM_NEEDS_ENV"
# What to do where a node does not see a file of the driver's disk.
SHARE = (
    "Local paths of --out and of sources must lead to the same files on every node: give a folder that all nodes "
    "share, or an address in a store (s3://BUCKET/PREFIX)"
)


class Machines(NamedTuple):
    """Totals over all nodes: cores, GPUs, and bytes of Ray's object store."""

    cpus: float
    gpus: float
    object_store_bytes: float
    nodes: int = 1
    # Of each node that takes tasks; empty where only the totals are known.
    node_cpus: tuple[float, ...] = ()
    node_gpus: tuple[float, ...] = ()
    node_memory: tuple[float, ...] = ()
    # Of the CPUs of those that were asked, as Linux names them.
    node_cpu_flags: tuple[frozenset[str], ...] = ()
    may_grow: bool = False


def cpuinfo(*names: str) -> str:
    """The first value under one of `names` in /proc/cpuinfo. Empty elsewhere than on Linux: macOS on ARM computes
    bfloat16 in software, so it has no flags that count."""
    path = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not path.exists():
        return ""
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""

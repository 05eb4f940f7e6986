"""Before the first row: does every node of the cluster run the code that the driver runs, and has what it needs?"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from schemas.errors import ClusterError
from schemas.machines import NEEDED_VARIABLES, SHARE
from schemas.release import PACKAGES, Release, release

# A node may have to unpack a working directory or start its first worker process.
_ANSWER_S = 300.0
_GONE = (
    ray.exceptions.TaskUnschedulableError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.LocalRayletDiedError,
)


def check_nodes(shared: Callable[[], Sequence[str]] = tuple) -> dict[str, frozenset[str]]:
    """Ask every node for its release; gives the flags of its CPU, as Linux names them, by node ID. Raises ClusterError
    naming each node that cannot import the packages, that has other ones, that lacks a variable which the job was
    said to need, or that takes tasks and does not see one of the files `shared`, which are asked for where there are
    several nodes.

    A node that dies meanwhile is no longer asked; one that joins later is checked by its workers.
    """
    mine = release()
    alive = [node for node in ray.nodes() if node["Alive"]]
    files = list(shared()) if len(alive) > 1 else []
    needed = os.environ.get(NEEDED_VARIABLES, "").split()
    task = ray.remote(num_cpus=0, max_retries=1)(_looker())
    asked = {
        node["NodeID"]: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(PACKAGES, needed, files if node["Resources"].get("CPU") else [])
        for node in alive
    }
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ANSWER_S)
    answers = {node: _answer(reference) for node, reference in asked.items()}
    wrong = {node: text for node, answer in answers.items() if (text := _problem(answer, mine))}
    blind = {node: text for node, answer in answers.items() if (text := _unseen(answer))}
    if wrong or blind:
        lines = [f"node {node[:12]}{text}" for found in (wrong, blind) for node, text in found.items()]
        alike = (
            f"\nThe driver on {mine.host} has {mine}. Install the same on every node, use one image, or submit with "
            "--working-dir; variables are set where `ray start` runs"
        )
        raise ClusterError(
            f"{len(wrong | blind)} of {len(asked)} nodes cannot work on this job:\n  "
            + "\n  ".join(lines)
            + (alike if wrong else "")
            + (f"\n{SHARE}" if blind else "")
        )
    return {node: frozenset(answer.flags) for node, answer in answers.items() if isinstance(answer, _Answer)}


class _Answer(NamedTuple):
    """What a node says. `why` is set where the packages cannot be imported."""

    host: str
    missing: list[str]
    found: tuple[str, ...]
    why: str
    flags: list[str]
    unseen: list[str]


def _looker() -> Callable[[Sequence[str], Sequence[str], Sequence[str]], tuple[Any, ...]]:
    """The function that a node runs. A nested one, because it travels by value: a node without the packages could not
    import it, nor the class of its result."""

    def look(packages: Sequence[str], needed: Sequence[str], files: Sequence[str]) -> tuple[Any, ...]:
        import importlib
        import os
        import socket
        import traceback

        missing = [name for name in needed if not os.environ.get(name)]
        unseen = [path for path in files if not os.path.exists(path)]
        try:
            for package in packages:
                importlib.import_module(package)
            found = tuple(importlib.import_module("schemas.release").release())
            # Another release may lack it, and is to be told what it has, not what it lacks.
            read = getattr(importlib.import_module("schemas.machines"), "cpuinfo", lambda *names: "")
        except Exception:  # noqa: BLE001 - whatever a broken installation raises is what the driver must hear
            return socket.gethostname(), missing, (), traceback.format_exc(limit=0).strip().splitlines()[-1], [], unseen
        return socket.gethostname(), missing, found, "", read("flags", "Features").split(), unseen

    return look


def _answer(reference: Any) -> _Answer | str | None:
    """What a node says, why it says nothing, or None where it is gone."""
    try:
        return _Answer(*ray.get(reference, timeout=0))
    except _GONE:
        return None
    except ray.exceptions.GetTimeoutError:
        return f": no worker process answered within {_ANSWER_S:g} s"
    except ray.exceptions.RayError as error:
        return f": no worker process starts there ({str(error).strip().splitlines()[-1]})"


def _problem(answer: _Answer | str | None, mine: Release) -> str:
    """What is wrong with a node, behind its name; empty for nothing."""
    if not isinstance(answer, _Answer):
        return answer or ""
    where = f" on {answer.host}: "
    if answer.why:
        return f"{where}cannot import patchstream ({answer.why})"
    wrong = [f"has {Release(*answer.found)}"] if answer.found[:2] != mine[:2] else []
    wrong += [f"{', '.join(answer.missing)} not set in its environment"] if answer.missing else []
    return where + "; ".join(wrong) if wrong else ""


def _unseen(answer: _Answer | str | None) -> str:
    """Which files of the driver's disk a node does not see, behind its name; empty for none."""
    if not isinstance(answer, _Answer) or not answer.unseen:
        return ""
    return f" on {answer.host}: does not see {', '.join(answer.unseen)}"

"""A Ray cluster of several nodes on this machine: each node is a `ray start` of its own, with its own raylet and store.

What it is for: to see what a job does when machines come, go and die, before there are machines. The nodes share the
cores; their CPU counts are what Ray books. Loopback only, and whoever connects needs the token.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from schemas.errors import ClusterError

_START_S = 120.0
_STARTS = 3
_STOP_S = 10.0
_POLL_S = 0.1
_JOIN = re.compile(r"ray start --address='([^']+)'")
_DASHBOARD = re.compile(r"RAY_API_SERVER_ADDRESS='([^']+)'")
_STARTED = "This command will now block"
# Each of these would otherwise be the same port on every node of this machine.
_OWN_PORTS = ("--dashboard-agent-listen-port=0", "--metrics-export-port=0")


class NodeSize(NamedTuple):
    """What a node tells Ray that it has. Ray's object store takes at least 78 MiB."""

    cpus: int = 1
    gpus: int = 0
    store_bytes: int = 256 << 20


_SMALL = NodeSize()
_HEAD = NodeSize(cpus=0)


class Node:
    """One `ray start --block` and what it started."""

    def __init__(self, process: "subprocess.Popen[bytes]", log_path: Path) -> None:
        self.process = process
        self.log_path = log_path

    @property
    def raylet(self) -> psutil.Process:
        """The node's raylet. Raises ClusterError where the node is gone."""
        for child in self._below():
            with contextlib.suppress(psutil.Error):
                if child.name() == "raylet":
                    return child
        raise ClusterError(f"the node of process {self.process.pid} has no raylet any more")

    def stop(self) -> None:
        """End the node in an orderly way; whatever is left after 10 s is killed."""
        doomed = self._below()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_S)
        self._end(doomed)

    def log(self) -> str:
        """What `ray start` wrote."""
        return self.log_path.read_text(errors="replace")

    def _below(self) -> list[psutil.Process]:
        try:
            children: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
            return children
        except psutil.NoSuchProcess:
            return []

    def _end(self, doomed: Sequence[psutil.Process]) -> None:
        for process in [*doomed, *self._below()]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.kill()
        self.process.wait()


class LocalCluster:
    """A head, which takes no task, and the nodes that joined it."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.nodes: list[Node] = []
        self.address = self.dashboard = ""
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            # A job that is submitted runs `python`: this one.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            **environment,
        }

    def start_head(self, size: NodeSize) -> Node:
        """Start the node that the others join."""
        fixed = ["--head", "--port=0", "--dashboard-host=127.0.0.1", "--dashboard-port=0"]
        (node,) = self._start([(fixed, size, {})])
        self.address, self.dashboard = _said(node, _JOIN), _said(node, _DASHBOARD)
        return node

    @property
    def alive(self) -> list[Node]:
        """The nodes that run, the head first."""
        return [node for node in self.nodes if node.process.poll() is None]

    @property
    def variables(self) -> dict[str, str]:
        """What the environment of a driver must hold, so that it runs here."""
        named = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED")
        return {"RAY_ADDRESS": self.address, **{name: self._environment[name] for name in named}}

    def join(self, *sizes: NodeSize, environment: Mapping[str, str] | None = None) -> list[Node]:
        """Start one more node for each of `sizes`. `environment` is what differs from that of the other nodes."""
        return self._start([([f"--address={self.address}"], size, environment or {}) for size in sizes])

    def close(self) -> None:
        """Stop every node, the head last, and remove the session's folder."""
        for node in reversed(self.nodes):
            node.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, wanted: Sequence[tuple[list[str], NodeSize, Mapping[str, str]]]) -> list[Node]:
        """Start nodes side by side and wait until each is there. One that Ray gives up on, which it does after 30 s
        on a machine that is busy, is started again."""
        nodes = [self._launch(*one) for one in wanted]
        for position, one in enumerate(wanted):
            for attempt in range(_STARTS):
                try:
                    _wait(nodes[position])
                    break
                except ClusterError:
                    nodes[position].stop()
                    if attempt == _STARTS - 1:
                        raise
                    nodes[position] = self._launch(*one)
        return nodes

    def _launch(self, arguments: list[str], size: NodeSize, environment: Mapping[str, str]) -> Node:
        place = self.folder / str(len(self.nodes))
        place.mkdir()
        log_path = place / "node.log"
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--log-color=false", *arguments),
            *(f"--num-cpus={size.cpus}", f"--num-gpus={size.gpus}", f"--object-store-memory={size.store_bytes}"),
            *(*_OWN_PORTS, "--include-log-monitor=false", f"--temp-dir={place}"),
        ]
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self._environment, **environment},
                start_new_session=True,
            )
        node = Node(process, log_path)
        self.nodes.append(node)
        return node


@contextlib.contextmanager
def local_cluster(
    sizes: Sequence[NodeSize] = (_SMALL, _SMALL),
    *,
    head: NodeSize = _HEAD,
    environment: Mapping[str, str] | None = None,
) -> Iterator[LocalCluster]:
    """A head and a node for each of `sizes`, for as long as the block lasts. Raises ClusterError if one will not start.

    `environment` is added to that of every node; with another `PYTHONPATH` in `LocalCluster.join` one node can run
    another version of the package than the rest.
    """
    # Ray puts sockets below this folder, whose paths may have 107 characters: not under a long TMPDIR.
    folder = Path(tempfile.mkdtemp(prefix="ps-", dir="/tmp"))
    cluster = LocalCluster(folder, environment or {})
    try:
        cluster.start_head(head)
        cluster.join(*sizes)
        yield cluster
    finally:
        cluster.close()


def _wait(node: Node) -> None:
    deadline = time.monotonic() + _START_S
    while _STARTED not in node.log():
        if node.process.poll() is not None or time.monotonic() > deadline:
            why = "ended" if node.process.returncode is not None else f"was not there after {_START_S:g} s"
            raise ClusterError(f"a Ray node that was to start {why}:\n{node.log()[-2000:]}")
        time.sleep(_POLL_S)


def _said(node: Node, pattern: re.Pattern[str]) -> str:
    found = pattern.search(node.log())
    if found is None:
        raise ClusterError(f"`ray start` did not say its address ({pattern.pattern}):\n{node.log()[-2000:]}")
    return found.group(1)

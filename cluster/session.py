"""Attach to a Ray cluster, or start one on this machine for as long as the job lasts."""

import contextlib
import logging
import math
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import psutil
import ray
from ray._private.utils import estimate_available_memory, get_num_cpus

from cluster.check import check_nodes
from cluster.token import check_token
from schemas.errors import ClusterError, Interrupted
from schemas.machines import Machines

_MIB = 1 << 20
# Room for blocks in flight: one for a GPU is 70 to 130 MiB, each decoding core may have two, and Ray Data uses half of
# the store. Memory is taken only as blocks come.
_STORE_BYTES = 2048 * _MIB
_STORE_BYTES_A_CPU = 1024 * _MIB
_STORE_SHARE = 0.2
_SHARED_MEMORY = "/dev/shm"
_SHARED_MEMORY_SHARE = 0.9
_KNOCK_S = 10.0
_LOOK_S = 1.0
_ASK_AGAIN_S = 10.0
_SLOW_START_S = 120.0
# How Ray begins where it finds a cluster of another Ray or Python.
_MISMATCH = "Version mismatch"

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def ray_session(
    address: str | None = None,
    *,
    verbose: bool = False,
    cpus: int | None = None,
    bundles: Sequence[Mapping[str, float]] = (),
    wait_s: float = 0.0,
    shared: Callable[[], Sequence[str]] = tuple,
) -> Iterator[Machines]:
    """Ray for the duration of the block.

    Attaches to `address` or `RAY_ADDRESS` when given, uses a session that is already open, or else starts a local
    one and shuts it down at the end. Raises ClusterError when an address does not answer, or a node of the cluster
    does not run the code that this process runs. With `wait_s` a cluster that lacks `bundles` (what each actor needs)
    is asked to grow, and given that long; the job then starts with what there is. `shared` gives files of this
    machine's disk that every node must see.
    """
    if ray.is_initialized():
        yield machines()
        return
    address = address or os.environ.get("RAY_ADDRESS")
    quiet(verbose)
    if address:
        _knock(address)
    with contextlib.nullcontext() if address else _own_token(), _connected(address, verbose, cpus):
        if address and wait_s:
            _wait_for_machines(bundles, wait_s)
        flags = check_nodes(shared) if address else {}
        yield machines(flags)._replace(may_grow=bool(address))


@contextlib.contextmanager
def _connected(address: str | None, verbose: bool, cpus: int | None) -> Iterator[None]:
    try:
        with _keeping_handlers(), _telling_of_a_slow_start():
            ray.init(**({"address": address} if address else _start(cpus)), **_logging(verbose))
    except SystemExit as told:  # by Ray's own handler, with the signal's number
        if told.code != signal.SIGTERM:
            raise
        raise Interrupted("told to stop", signal.SIGTERM) from None
    except Exception as error:  # a start that took half a minute is a bare one
        why = str(error).strip() or type(error).__name__
        if not address:
            raise ClusterError(
                f"Ray could not be started on this machine: {why}. Where it is busy, the same command may pass"
            ) from error
        if why.startswith(_MISMATCH):
            raise _other_versions(address, why) from error
        raise _nobody(address, why.splitlines()[0]) from error
    try:
        yield
    finally:
        with _keeping_handlers():
            ray.shutdown()


@contextlib.contextmanager
def _keeping_handlers() -> Iterator[None]:
    """Whoever handles SIGTERM goes on doing so: Ray installs a handler that ends the process at once when it connects,
    and none at all when it is left."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _telling_of_a_slow_start() -> Iterator[None]:
    """Ray waits without end, and deaf to Ctrl-C, where a process that it started was killed before it was ready."""
    advice = (
        "Ray has not started for %d s. On a busy machine it may yet; where it ran out of memory it waits without end: "
        "`kill %d` then ends this, and the same command goes on from there"
    )
    timer = threading.Timer(_SLOW_START_S, _log.warning, (advice, _SLOW_START_S, os.getpid()))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _wait_for_machines(bundles: Sequence[Mapping[str, float]], wait_s: float) -> None:
    """Ask the cluster's autoscaler for room, and wait for it. A cluster without one does not change by being asked."""
    from ray.autoscaler.sdk import request_resources  # slow to import, and few need it

    wanted = [dict(bundle) for bundle in bundles] or [{"CPU": 1.0}]
    gpus, cpus = (sum(bundle.get(name, 0.0) for bundle in wanted) for name in ("GPU", "CPU"))
    asked_at, deadline = float("-inf"), time.monotonic() + wait_s
    try:
        while (now := machines()).gpus < gpus or now.cpus < cpus:
            if time.monotonic() > deadline:
                break
            if time.monotonic() - asked_at >= _ASK_AGAIN_S:
                # A cluster has one request, which another job replaces when it waits too, or no longer does.
                request_resources(bundles=wanted)
                asked_at = time.monotonic()
            time.sleep(_LOOK_S)
    finally:
        # A request stands until it is taken back, and would keep idle machines.
        request_resources(bundles=[])


def quiet(verbose: bool) -> None:
    """Keep Ray's own chatter out of the terminal unless asked for."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not verbose:
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _knock(address: str) -> None:
    """Fail at once where nobody listens, or our token is not the cluster's; Ray itself would try for long."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
    except OSError as error:
        raise _nobody(address, str(error)) from error
    if "://" not in address:
        check_token(address, _KNOCK_S)


def _nobody(address: str, why: str) -> ClusterError:
    return ClusterError(
        f"no Ray cluster answers at {address} ({why}); check the address, or unset RAY_ADDRESS to run on this machine"
    )


def _other_versions(address: str, why: str) -> ClusterError:
    return ClusterError(
        f"the Ray cluster at {address} has another Ray or Python than this machine. {why}\n"
        "Use the cluster's versions here: Ray wants its own and Python's to be the same to the last number"
    )


def _keep_workers() -> None:
    """Let idle workers live for a minute. Ray ends those above one for each core after a second, and starting another
    takes three seconds of a core, which on a small machine the models lack. What was set by hand stays."""
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")


@contextlib.contextmanager
def _own_token() -> Iterator[None]:
    """Let the Ray of this job have a token that nobody else knows, where there is none. Ray would write one to ~/.ray,
    and a container may have no home to write to. The mode is Ray's to set, for its whole process; afterwards it is what
    it was: a cluster that this process turns to later has another token, or wants none."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled

    tokens = AuthenticationTokenLoader.instance()
    mode = os.environ.get("RAY_AUTH_MODE")
    try:
        own = mode != "disabled" and not tokens.has_token(ignore_auth_mode=True)
    except ray.exceptions.AuthenticationError as error:
        raise ClusterError(
            f"RAY_AUTH_TOKEN_PATH={os.environ.get('RAY_AUTH_TOKEN_PATH')}: no token can be read there. Put one into "
            "that file, or unset the variable: a job on this machine makes its own"
        ) from error
    if own:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        yield
    finally:
        if own:
            os.environ.pop("RAY_AUTH_TOKEN", None)
            tokens.reset_cache()
        if mode is None:
            os.environ.pop("RAY_AUTH_MODE", None)
            Config.initialize("")  # as Ray does where it sets the mode: it is read once


def _start(cpus: int | None) -> dict[str, Any]:
    _keep_workers()
    cpus = cpus or _own_cpus()
    return {
        "address": "local",
        "num_cpus": cpus,
        "object_store_memory": _store_bytes(cpus),
        "include_dashboard": False,
    }


def _own_cpus() -> int:
    """Cores that this process may use. Ray reads a container's limit, which it rounds down, to none if need be, but not
    an affinity (taskset, a share given by Slurm, cpuset under cgroup v2)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    return max(1, min(allowed, int(get_num_cpus())))


def _store_bytes(cpus: int) -> int:
    """Size of the local object store. Beyond what shared memory holds, Ray would put all of it on the disk. Of a
    container's limit it takes no larger share than of a machine's memory: the rest is what actors can book."""
    available = min(psutil.virtual_memory().available, estimate_available_memory())

    def within(wanted: float) -> int:
        return max(int(min(max(_STORE_BYTES, wanted), available * _STORE_SHARE)), 100 * _MIB)

    wanted = _STORE_BYTES_A_CPU * cpus
    if not os.path.isdir(_SHARED_MEMORY):
        return within(wanted)
    free = psutil.disk_usage(_SHARED_MEMORY).free
    store = within(min(wanted, _SHARED_MEMORY_SHARE * free))
    if store > free:
        _log.warning(
            "%s has %s MiB free, too little for Ray's object store of %s MiB, which goes to the disk instead and "
            "is slower there. Start the container with `docker run --shm-size=%dg`, on Kubernetes with an emptyDir of "
            "`medium: Memory` at %s",
            *(_SHARED_MEMORY, f"{free // _MIB:,}", f"{store // _MIB:,}"),
            *(math.ceil(within(wanted) / _SHARED_MEMORY_SHARE / 1024 / _MIB), _SHARED_MEMORY),
        )
    return store


def _logging(verbose: bool) -> dict[str, Any]:
    return {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
        "configure_logging": True,
        "ignore_reinit_error": True,
    }


def machines(cpu_flags: Mapping[str, frozenset[str]] = {}) -> Machines:
    """What the attached cluster has in all; `cpu_flags` by node ID, of the nodes that were asked for them."""
    total: dict[str, float] = ray.cluster_resources()
    alive = [node for node in ray.nodes() if node["Alive"]]
    taking = [node for node in alive if node["Resources"].get("CPU")]
    workers = [node["Resources"] for node in taking]
    return Machines(
        cpus=total.get("CPU", 0.0),
        gpus=total.get("GPU", 0.0),
        object_store_bytes=total.get("object_store_memory", 0.0),
        nodes=len(alive),
        node_cpus=tuple(resources["CPU"] for resources in workers),
        node_gpus=tuple(resources.get("GPU", 0.0) for resources in workers),
        node_memory=tuple(resources.get("memory", 0.0) for resources in workers),
        node_cpu_flags=tuple(cpu_flags[node["NodeID"]] for node in taking if node["NodeID"] in cpu_flags),
    )

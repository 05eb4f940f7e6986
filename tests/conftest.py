"""Fixtures for all tests: real servers, a clean environment, server logs in the report of a failure.

Nothing heavy is imported here: a fast test pays for no torch, ray or moto.
"""

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.faults import Rule
from support.flaky_proxy import FlakyProxy, Store
from support.flaky_proxy import flaky_proxy as run_flaky_proxy
from support.gcs import GcsServer
from support.gcs import gcs_server as run_gcs_server
from support.http_server import HttpServer
from support.http_server import http_server as run_http_server
from support.outside import NOTED, note
from support.processes import RUNNING
from support.s3 import S3Server
from support.s3 import s3_server as run_s3_server

# Whatever of the user's could change what a test does: accounts, endpoints, proxies, hub and Ray addresses.
_LEAKS = (
    *("AWS_", "S3_", "BOTO_", "GOOGLE_", "GCLOUD_", "CLOUDSDK_", "GCSFS_", "STORAGE_EMULATOR_", "AZURE_", "FSSPEC_"),
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
    *("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_", "PATCHSTREAM_"),
)
# What the tests themselves are asked to do.
_OURS = {f"PATCHSTREAM_{name}" for name in ("TESTDATA", "KUBERAY_CRDS", "KILLS", "NODE_KILLS", "FUZZ_SEED")}
_LOG_TAIL = 4000
_LOG_STARTS = pytest.StashKey[dict[Path, int]]()


def _clean_environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in _OURS or not name.upper().startswith(_LEAKS)}
    return {
        **kept,
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        # gcsfs reads it when it is imported; see support/gcs.py.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "NO_GCE_CHECK": "true",
        "AWS_EC2_METADATA_DISABLED": "true",
        # Ray workers unpickle what a test module defines, and so import what it imports.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])),
    }


def pytest_configure(config: pytest.Config) -> None:
    """No credentials, endpoints or proxies of the user in this process, an empty home, and SIGINT heeded.

    Before any test is imported: huggingface_hub and gcsfs read their variables when they are imported.
    """
    # Where pytest itself was started with SIGINT ignored, as `pytest … &` in a script, children would inherit that, and
    # tests that interrupt them would wait in vain.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    home = tempfile.TemporaryDirectory(prefix="patchstream-home-")
    before = dict(os.environ)
    note(getattr(config, "workerinput", {}).get("outside", before))
    _replace_environment(_clean_environment(Path(home.name)))
    config.add_cleanup(home.cleanup)
    config.add_cleanup(lambda: _replace_environment(before))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """A worker of pytest-xdist is about to start: it inherits the clean environment."""
    node.workerinput["outside"] = dict(NOTED)


def _replace_environment(wanted: Mapping[str, str]) -> None:
    for name in set(os.environ) - set(wanted):
        del os.environ[name]
    os.environ.update(wanted)


@pytest.fixture
def isolated_env(tmp_path: Path) -> Callable[[Mapping[str, str]], dict[str, str]]:
    """The whole environment for a subprocess: clean, with a home of its own, and what the caller adds."""

    def environment(extra: Mapping[str, str]) -> dict[str, str]:
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        return {**_clean_environment(home), **extra}

    return environment


@pytest.fixture
def set_env(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Mapping[str, str]], None]]:
    """Set variables of this process for one test. File systems made under other ones are forgotten."""

    def apply(variables: Mapping[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        _forget_file_systems()

    yield apply
    monkeypatch.undo()
    _forget_file_systems()


def _forget_file_systems() -> None:
    """fsspec hands out the same instance for the same options, also where the environment has changed since."""
    fsspec: Any = sys.modules.get("fsspec")
    if fsspec is None:
        return
    for protocol in fsspec.registry:
        fsspec.registry[protocol].clear_instance_cache()
    fsspec.config.conf.clear()
    fsspec.config.set_conf_env(fsspec.config.conf)


@pytest.fixture(scope="session")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the servers' logs go."""
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def s3_server(log_dir: Path) -> Iterator[S3Server]:
    """One S3 endpoint for all tests: make a bucket of your own."""
    with run_s3_server(log_dir=log_dir) as server:
        yield server


@pytest.fixture(scope="session")
def gcs_server(log_dir: Path) -> Iterator[GcsServer]:
    """One Google Cloud Storage endpoint for all tests: make a bucket of your own."""
    with run_gcs_server(log_dir=log_dir) as server:
        yield server


@pytest.fixture
def http_server(log_dir: Path) -> Iterator[Callable[..., HttpServer]]:
    """`http_server(folder, rules, seed=…)` starts a web server, which lives until the test ends."""
    with contextlib.ExitStack() as stack:

        def start(folder: Path, rules: Iterable[Rule] = (), seed: int = 0) -> HttpServer:
            return stack.enter_context(run_http_server(folder, rules, seed=seed, log_dir=log_dir))

        yield start


@pytest.fixture
def flaky_proxy(log_dir: Path) -> Iterator[Callable[..., FlakyProxy[Any]]]:
    """`flaky_proxy(server, rules, seed=…)` puts a proxy before a store, which lives until the test ends."""
    with contextlib.ExitStack() as stack:

        def start(behind: Store, rules: Iterable[Rule] = (), seed: int = 0) -> FlakyProxy[Store]:
            return stack.enter_context(run_flaky_proxy(behind, rules, seed=seed, log_dir=log_dir))

        yield start


@pytest.fixture
def pipe() -> Iterator[Callable[[bytes], str]]:
    """`pipe(content)` is the path of a pipe that holds it, as `<(…)` in a shell is one."""
    with contextlib.ExitStack() as stack:

        def make(content: bytes) -> str:
            read, write = os.pipe()
            stack.callback(os.close, read)
            os.write(write, content)
            os.close(write)
            return f"/dev/fd/{read}"

        yield make


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 96 drawn pictures and some broken files."""
    from jobs.demo.draw import write_broken, write_pictures

    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, 96, seed=11)
    write_broken(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random ViT classifier, slow enough to be caught at work: in float32 about 30 ms an image on a core."""
    from support.checkpoints import make_checkpoint

    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "vit", "vit-classifier", **shape)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    item.stash[_LOG_STARTS] = {process.log_path: process.log_path.stat().st_size for process in RUNNING}
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        starts = item.stash.get(_LOG_STARTS, {})
        for process in RUNNING:
            text = process.log(starts.get(process.log_path, 0))
            if text:
                report.sections.append((f"log of {process.name}", text[-_LOG_TAIL:]))
    return report

"""Writing with `pipeline/storage.py` to a disk, an S3 endpoint and a Google Cloud Storage endpoint."""

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.faults import WRITES, Rule
from support.flaky_proxy import FlakyProxy
from support.gcs import GcsServer
from support.s3 import S3Server

from pipeline.addresses import join
from pipeline.storage import create_bytes, filesystem, put_bytes, read_json
from schemas.errors import OutputError

Place = tuple[Any, str]  # a file system, and a folder on it that no other test uses
StartProxy = Callable[..., FlakyProxy[Any]]


@pytest.fixture(params=["file", "s3", "gs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "file":
        return filesystem(str(tmp_path / "out"), {})
    server = request.getfixturevalue("s3_server" if request.param == "s3" else "gcs_server")
    return filesystem(f"{request.param}://{server.make_bucket()}/out", server.storage_options)


# --- writing


def test_put_overwrites(place: Place) -> None:
    fs, folder = place
    path = join(folder, "images", "part.parquet")
    for data in (b"first, and longer", b"second", b""):
        put_bytes(fs, path, data)
        assert fs.cat_file(path) == data
    assert [os.path.basename(name) for name in fs.find(folder)] == ["part.parquet"]


def test_create_lets_only_the_first_write(place: Place) -> None:
    fs, folder = place
    path = join(folder, "run.json")
    assert create_bytes(fs, path, b"first") is True
    assert create_bytes(fs, path, b"second") is False
    assert fs.cat_file(path) == b"first"
    assert [os.path.basename(name) for name in fs.find(folder)] == ["run.json"]


def test_create_has_one_winner_among_many(place: Place) -> None:
    fs, folder = place
    path = join(folder, "run.json")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: create_bytes(fs, path, b"%d" % number), range(16)))
    assert won.count(True) == 1
    assert fs.cat_file(path) == b"%d" % won.index(True)


def keep_writing(fs: Any, path: str, contents: list[bytes]) -> None:
    for data in contents:
        put_bytes(fs, path, data)


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    fs, _ = filesystem(str(tmp_path), {})
    path = str(tmp_path / "part")
    whole = [bytes([letter]) * 3_000_000 for letter in b"ab"]
    put_bytes(fs, path, whole[0])
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(keep_writing, fs, path, whole * 10)
        seen = 0
        while not writing.done():
            assert Path(path).read_bytes() in whole
            seen += 1
        writing.result()
    assert seen > 5


def test_create_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    fs, folder = filesystem(str(tmp_path), {})
    path = join(folder, "run.json")
    assert [create_bytes(fs, path, data) for data in (b"first", b"second")] == [True, False]
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_bytes() == b"first"


def test_create_goes_on_after_a_conflict(s3_server: S3Server, flaky_proxy: StartProxy) -> None:
    conflict = Rule("status", methods=("PUT",), status=409, code="ConditionalRequestConflict", first=2)
    proxy = flaky_proxy(s3_server, [conflict])
    fs, path = filesystem(f"s3://{s3_server.make_bucket()}/run.json", proxy.server.storage_options)
    assert create_bytes(fs, path, b"first") is True
    assert proxy.control.faults() == 2
    proxy.control.set_rules(Rule("status", methods=("PUT",), status=409, code="ConditionalRequestConflict"))
    with pytest.raises(OutputError, match=r"run\.json"):
        create_bytes(fs, path, b"second")


def test_create_understands_stores_that_do_not_say_which_condition_failed(
    s3_server: S3Server, flaky_proxy: StartProxy
) -> None:
    proxy = flaky_proxy(s3_server, [Rule("status", methods=("PUT",), status=412, code="PreconditionFailed")])
    fs, path = filesystem(f"s3://{s3_server.make_bucket()}/run.json", proxy.server.storage_options)
    assert create_bytes(fs, path, b"x") is False


def test_read_json_where_there_is_none(place: Place) -> None:
    fs, folder = place
    assert read_json(fs, join(folder, "run.json")) is None
    put_bytes(fs, join(folder, "run.json"), b'{"a": [1]}')
    assert read_json(fs, join(folder, "run.json")) == {"a": [1]}


# --- what goes wrong while writing


def message(write: Callable[..., object], fs: Any, path: str) -> str:
    with pytest.raises(OutputError) as error:
        write(fs, path, b"x" * 100)
    assert path in str(error.value)
    assert error.value.exit_code == 2
    return str(error.value)


WRITERS = pytest.mark.parametrize("write", [put_bytes, create_bytes])


@WRITERS
def test_missing_bucket(s3_server: S3Server, gcs_server: GcsServer, write: Callable[..., object]) -> None:
    for url, server in (("s3://no-such-bucket/412/x", s3_server), ("gs://no-such-bucket/412/x", gcs_server)):
        assert "the folder or bucket does not exist" in message(write, *filesystem(url, server.storage_options))


@WRITERS
@pytest.mark.parametrize("name", ["s3", "gs"])
def test_denied_writes(
    name: str, write: Callable[..., object], request: pytest.FixtureRequest, flaky_proxy: StartProxy
) -> None:
    server = request.getfixturevalue("s3_server" if name == "s3" else "gcs_server")
    proxy = flaky_proxy(server)
    proxy.control.deny_writes()
    fs, path = filesystem(f"{name}://{server.make_bucket()}/run-412/x", proxy.server.storage_options)
    assert "denied" in message(write, fs, path)


@WRITERS
def test_a_store_that_keeps_asking_to_slow_down(
    s3_server: S3Server, write: Callable[..., object], flaky_proxy: StartProxy
) -> None:
    """Most requests are the decoding tasks', which read."""
    proxy = flaky_proxy(s3_server, [Rule("status", methods=WRITES, status=503)])
    # botocore itself would try again for ten seconds, each time.
    options = {**proxy.server.storage_options, "config_kwargs": {"retries": {"max_attempts": 0}}}
    fs, path = filesystem(f"s3://{s3_server.make_bucket()}/run-412/x", options)
    assert "go on later, or with a lower fetch.concurrency" in message(write, fs, path)


@WRITERS
def test_a_file_stands_in_the_way(tmp_path: Path, write: Callable[..., object]) -> None:
    (tmp_path / "out").write_text("not a folder")
    fs, _ = filesystem(str(tmp_path), {})
    for path in (tmp_path / "out" / "x", tmp_path / "out" / "images" / "x"):
        assert "a file stands where a folder is needed" in message(write, fs, str(path))
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    if write is put_bytes:
        assert "a folder stands where the file should go" in message(write, fs, str(tmp_path / "folder"))
    assert [entry.name for entry in sorted(tmp_path.iterdir())] == ["folder", "out"]


# A write of `size` bytes to `path` in a process of its own; prints the error. `before` is run first.
_WRITE = """
import os, resource, sys
from pipeline.storage import filesystem, put_bytes
from schemas.errors import OutputError
path, size, before = sys.argv[1], int(sys.argv[2]), sys.argv[3]
fs, path = filesystem(path, {})
exec(before)
try:
    put_bytes(fs, path, bytes(size))
except OutputError as error:
    print(error, os.listdir(os.path.dirname(path)))
"""


def write_elsewhere(path: Path, size: int, before: str = "", prefix: tuple[str, ...] = ()) -> str:
    command = [*prefix, sys.executable, "-c", _WRITE, str(path), str(size), before]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def on_a_file_system_of_its_own(folder: Path, options: str) -> tuple[str, ...]:
    """The beginning of a command that sees a fresh tmpfs on `folder`, which goes away with it."""
    mount = 'mount -t tmpfs -o "$1" tmpfs "$0" && shift && exec "$@"'
    prefix = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(folder), options)
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no unprivileged mounts here")
    return prefix


def test_full_disk(tmp_path: Path) -> None:
    prefix = on_a_file_system_of_its_own(tmp_path, "size=64k")
    told = write_elsewhere(tmp_path / "part.parquet", 1_000_000, prefix=prefix)
    assert f"cannot write {tmp_path}/part.parquet: the disk is full; free some space" in told
    assert told.endswith("[]\n")  # the half-written file is gone
    assert write_elsewhere(tmp_path / "part.parquet", 10_000, prefix=prefix) == ""


def test_read_only_file_system(tmp_path: Path) -> None:
    prefix = on_a_file_system_of_its_own(tmp_path, "ro")
    assert "the file system is read-only; choose another --out" in write_elsewhere(tmp_path / "x", 1, prefix=prefix)


def test_file_size_limit(tmp_path: Path) -> None:
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
    told = write_elsewhere(tmp_path / "part.parquet", 5000, before=limit)
    assert "the file is larger than the limit for files here" in told
    assert told.endswith("[]\n")


def test_what_cannot_be_created_whole_without_hard_links_is_not_there(tmp_path: Path) -> None:
    full = """
import errno
from pipeline.storage import create_bytes as put_bytes
def refuse(source, target):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    raise OSError(errno.EPERM, "Operation not permitted")
os.link = refuse
"""
    told = write_elsewhere(tmp_path / "000001.json", 5000, before=full)
    assert "the file is larger than the limit for files here" in told
    assert told.endswith("[]\n")


def test_folder_without_write_permission() -> None:
    as_nobody = "os.getuid() == 0 and os.setuid(65534)"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        told = write_elsewhere(folder / "x", 1, before=as_nobody)
    assert f"cannot write {folder}/x: writing there is denied; check the permissions" in told


def test_an_error_tells_no_secrets() -> None:
    fs, _ = filesystem("http://localhost", {})
    with pytest.raises(OutputError) as error:
        put_bytes(fs, "http://user:hunter2@localhost:1/x?X-Amz-Signature=c0ffee", b"x")
    assert "localhost:1/x" in str(error.value)
    assert "hunter2" not in str(error.value)
    assert "c0ffee" not in str(error.value)


INTERRUPTED = """
import sys
import fsspec
from pipeline.storage import filesystem
fsspec.register_implementation("slow", "slow_driver.SlowFileSystem")
try:
    filesystem("slow://a", {})
except KeyboardInterrupt:
    print("interrupted")
print(filesystem("slow://a", {})[0].whole)
"""


def test_a_driver_is_imported_whole_also_when_the_task_is_cancelled_meanwhile(tmp_path: Path) -> None:
    """Ray cancels a task with the exception of Ctrl-C, and gives the process to the next task."""
    (tmp_path / "slow_parts").mkdir()
    (tmp_path / "slow_parts/__init__.py").write_text(
        "import slow_parts.errors\nimport _thread\n_thread.interrupt_main()\n"
    )
    (tmp_path / "slow_parts/errors.py").write_text("")
    (tmp_path / "slow_driver.py").write_text(
        "import slow_parts\nfrom fsspec.implementations.memory import MemoryFileSystem\n"
        "class SlowFileSystem(MemoryFileSystem):\n    protocol = 'slow'\n    whole = hasattr(slow_parts, 'errors')\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["interrupted", "True"], done.stderr

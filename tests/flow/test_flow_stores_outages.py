"""The place of the output fails for good, or several jobs fill it side by side: nothing is lost, nothing doubled."""

import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from fsspec.implementations.local import LocalFileSystem
from support.commands import attempt_records, start
from support.flaky_proxy import FlakyProxy
from support.gcs import GcsServer
from support.s3 import S3Server

from pipeline import maintenance
from pipeline.flow import Connect, run
from pipeline.progress import Progress
from schemas.errors import Interrupted, OutputError, PatchstreamError
from schemas.machines import Machines
from schemas.spec import JobSpec, build_spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Server = S3Server | GcsServer
ROWS = 6000


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of addresses; without a model nobody looks what is behind them."""
    path = tmp_path_factory.mktemp("table") / "list.parquet"
    pq.write_table(pa.table({"uri": [f"s3://nowhere/{number:05d}.jpg" for number in range(ROWS)]}), path)
    return path


def spec_for(source: Path, out: str, **values: Any) -> JobSpec:
    base = {"model": "null", "backend": "null", "sink": {"commit_s": 0.1, "part_bytes": 1}}
    return build_spec({"sources": [str(source)], "out": out, **base, **values})


def rows_of(out: str, options: Mapping[str, Any]) -> list[int]:
    """Row numbers as a plain glob over images/ sees them."""
    fs, path = fsspec.core.url_to_fs(out, **options)
    fs.invalidate_cache()
    found: list[int] = []
    for name in sorted(fs.glob(f"{path}/images/*.parquet")):
        with fs.open(name, "rb") as file:
            found += pq.read_table(file, columns=["row"])["row"].to_pylist()
    return found


@pytest.mark.parametrize(("scheme", "outage"), [("s3", "deny_writes"), ("gs", "vanish")])
def test_what_was_committed_before_an_outage_stays(
    scheme: str, outage: str, addresses: Path, connect: Connect,
    flaky_proxy: Callable[..., FlakyProxy[Any]], request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    server: Server = request.getfixturevalue("s3_server" if scheme == "s3" else "gcs_server")
    proxy = flaky_proxy(server)
    out = f"{scheme}://{server.make_bucket()}/out"
    spec = spec_for(addresses, out, storage_options={scheme: proxy.server.storage_options})

    def fail_after_the_first_commit(progress: Progress) -> None:
        if progress.committed and not outages:
            outages.append(progress.committed)
            getattr(proxy.control, outage)()

    outages: list[int] = []
    with pytest.raises(OutputError) as raised:
        run(spec, connect, fail_after_the_first_commit)
    assert raised.value.exit_code == 2
    place = out.partition("://")[2]
    # Who notices first is a race: a write that cannot go on, a worker that wants its next rows of the manifest, or, in
    # a bucket that has vanished, a writer that looks whether the attempt is still its job's.
    message = rf"cannot (write \S*{place}/images/|read \S*{place}/manifest).*What was committed stays"
    gone = rf"{place}: attempt 1 is no longer that of this job .* the directory was deleted"
    expected = message if outage == "deny_writes" else f"{message}|{gone}"
    assert re.search(expected, str(raised.value), re.DOTALL), raised.value
    assert "not-a-secret" not in str(raised.value)
    kept = rows_of(out, server.storage_options)
    assert len(set(kept)) == len(kept)
    assert outages[0] <= len(kept) < ROWS

    proxy.control.set_rules()
    summary = run(spec, connect)
    assert summary.images == ROWS
    # Not equal: a write that was under way when the first one failed may still have succeeded.
    assert summary.attempt.rows_planned <= ROWS - len(kept)
    assert sorted(rows_of(out, server.storage_options)) == list(range(ROWS))
    assert maintenance.verify(out, {scheme: server.storage_options}).problems == []


def test_an_output_that_cannot_be_written_from_the_start(
    tmp_path: Path, addresses: Path, s3_server: S3Server, flaky_proxy: Callable[..., FlakyProxy[Any]]
) -> None:
    """Said before any work: no Ray is started for it."""

    def never() -> AbstractContextManager[Machines]:
        raise AssertionError("Ray was started")

    proxy = flaky_proxy(s3_server)
    bucket = s3_server.make_bucket()
    proxy.control.deny_writes()
    spec = spec_for(addresses, f"s3://{bucket}/out", storage_options={"s3": proxy.server.storage_options})
    with pytest.raises(OutputError, match=rf"cannot write s3://{bucket}/out/.*denied; check the permissions"):
        run(spec, never)
    options = {"s3": s3_server.storage_options}
    with pytest.raises(OutputError, match=r"cannot write s3://no-such-bucket-here/out/.*does not exist"):
        run(spec_for(addresses, "s3://no-such-bucket-here/out", storage_options=options), never)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=rf"cannot write {tmp_path}/file/out"):
        run(spec_for(addresses, f"{tmp_path}/file/out"), never)


@pytest.mark.parametrize("first", [OutputError("cannot write a part"), KeyboardInterrupt()])
def test_a_store_that_has_gone_does_not_hide_what_ended_the_run(
    tmp_path: Path, addresses: Path, monkeypatch: pytest.MonkeyPatch, first: BaseException
) -> None:
    """The end of an attempt is to be noted where nobody answers any more."""

    def no_answer(*arguments: object, **options: object) -> Any:
        raise RuntimeError("could not connect")  # drivers have errors of their own, and not all of them an OSError

    def never() -> AbstractContextManager[Machines]:
        monkeypatch.setattr(LocalFileSystem, "cat_file", no_answer)
        raise first

    with pytest.raises(PatchstreamError, match=r"cannot write a part|interrupted; what was committed stays") as ended:
        run(spec_for(addresses, str(tmp_path / "out")), never)
    assert ended.value.exit_code == (2 if isinstance(first, OutputError) else 130)


def test_a_signal_is_what_ends_a_run_whose_last_write_fails(tmp_path: Path, addresses: Path, connect: Connect) -> None:
    out = tmp_path / "out"

    def stop_at_the_first_rows(progress: Progress) -> None:
        if progress.phase == "running" and not (out / "images").exists():
            (out / "images").write_text("in the way")
            os.kill(os.getpid(), signal.SIGTERM)

    spec = spec_for(addresses, str(out), sink={"commit_s": 60})
    with pytest.raises(Interrupted) as ended:
        run(spec, connect, stop_at_the_first_rows)
    assert ended.value.exit_code == 143
    (record,) = attempt_records(out)
    assert (record["status"], record["images"]) == ("interrupted", 0)
    (out / "images").unlink()
    assert run(spec, connect).images == ROWS


# --- several jobs, one output


@pytest.fixture
def two_jobs(tmp_path: Path, addresses: Path) -> Iterator[Callable[[str, Mapping[str, Any]], list[str]]]:
    """Start `--shard 0/2` and `1/2` at the same moment on the Ray of this module; gives what they printed."""
    processes = []

    def go(out: str, options: Mapping[str, Any]) -> list[str]:
        config = tmp_path / "job.toml"
        config.write_text('backend = "null"\n[sink]\ncommit_s = 0.2\npart_bytes = 1\n')
        env = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        for shard in ("0/2", "1/2"):
            log = tmp_path / f"shard-{shard[0]}.log"
            arguments = ["embed", addresses, "--out", out, "--config", config, "--shard", shard, "--no-report"]
            arguments += ["--storage-options", json.dumps(options), "--json"] if options else ["--json"]
            processes.append(start(*arguments, log=log, env=env))
        assert [process.wait(timeout=200) for process in processes] == [0, 0], _logs(tmp_path)
        return _logs(tmp_path)

    yield go
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def _logs(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("shard-*.log"))]


@pytest.mark.parametrize("place", [pytest.param("disk", marks=pytest.mark.long), "s3"])
def test_two_shards_fill_one_output_at_the_same_time(
    tmp_path: Path, place: str, connect: Connect, two_jobs: Callable[..., list[str]], s3_server: S3Server
) -> None:
    out, options = str(tmp_path / "out"), {}
    if place == "s3":
        out, options = f"s3://{s3_server.make_bucket()}/out", s3_server.storage_options
    printed = two_jobs(out, {"s3": options} if options else {})
    assert [json.loads(text.strip().splitlines()[-1])["images"] for text in printed] == [ROWS // 2, ROWS // 2]
    assert sorted(rows_of(out, options)) == list(range(ROWS))
    found = maintenance.status(out, {"s3": options} if options else {})
    assert [found["manifest_rows"], found["images"], found["pending"]] == [ROWS, ROWS, 0]
    assert sorted((a["shard_index"], a["status"], a["images"]) for a in found["attempts"]) == [
        *((0, "done", ROWS // 2), (1, "done", ROWS // 2))
    ]
    assert maintenance.verify(out, {"s3": options} if options else {}).problems == []
    fs, path = fsspec.core.url_to_fs(out, **options)
    fs.invalidate_cache()
    # One of the two froze the inputs; no lock and no second manifest is left.
    (name,) = fs.ls(f"{path}/manifest", detail=False)
    assert re.fullmatch(f"manifest-{0:012d}-{ROWS:012d}-[0-9a-f]{{8}}.parquet", name.rpartition("/")[2])
    assert not fs.exists(f"{path}/_freezing")

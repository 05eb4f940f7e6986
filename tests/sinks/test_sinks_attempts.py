"""Who may write: the newest attempt on the same rows, and none that would end a living one by accident."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileSystem
from support.faults import WRITES, Rule
from support.flaky_proxy import FlakyProxy

from pipeline.attempt_files import as_known, is_alive
from pipeline.signals import interruptible
from pipeline.sinks import attempts
from pipeline.sinks.ray_writer import WriteJob, write_blocks
from schemas.attempt import AttemptRecord
from schemas.errors import Interrupted, OutputError
from schemas.tables import images_schema, output_fields, predicted_schema
from schemas.values import Shard


def test_the_newest_attempt_wins(tmp_path: Path) -> None:
    whole = Shard(index=0, count=1)
    old, first = attempts.claim(str(tmp_path), whole, {}, "embed")
    old.check()
    attempts.finish(str(tmp_path), first, {})
    new, _ = attempts.claim(str(tmp_path), whole, {}, "embed")
    new.check()
    with pytest.raises(OutputError, match=r"attempt 2 .* has taken over from attempt 1"):
        old.check()


@pytest.mark.parametrize("failed", [None, "decode"])
def test_a_write_that_was_overtaken_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: str | None
) -> None:
    monkeypatch.setattr("pipeline.logs.working_on", lambda *arguments: None)  # the log of a worker, which this is not
    whole = Shard(index=0, count=1)
    out = str(tmp_path)
    old, first = attempts.claim(out, whole, {}, "embed")
    outputs = output_fields({"cls": 2}, "float32", labels=False)
    line = {"row": 0, "uri": "file:///0.jpg"}
    line |= {"cls": [0.0, 1.0]} if failed is None else {"stage": failed, "error": "Truncated", "message": "m"}
    rows = pa.Table.from_pylist([line], schema=predicted_schema(outputs, []))
    write_blocks(WriteJob(old, images_schema(outputs, []), b"{}", "r"), rows)
    (part,) = tmp_path.glob("*/*.parquet")
    part.unlink()
    attempts.finish(out, first, {})
    attempts.claim(out, whole, {}, "embed")
    with pytest.raises(OutputError, match=r"attempt 2 .* has taken over from attempt 1"):
        write_blocks(WriteJob(old, images_schema(outputs, []), b"{}", "r"), rows)
    assert not list(tmp_path.glob("*/*.parquet"))


@pytest.mark.parametrize(
    ("status", "ended_s_ago", "waits"),
    [
        ("running", None, True),
        ("interrupted", 5, True),
        ("failed", 5, True),
        ("failed", 600, False),
        ("done", 5, False),
    ],
)
def test_the_last_writes_of_an_attempt_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: Any, ended_s_ago: int | None, waits: bool
) -> None:
    """Between the question of an orphan and its write lies time, and only then may be looked what is done."""
    whole = Shard(index=0, count=1)
    with monkeypatch.context() as there:
        there.setattr("socket.gethostname", lambda: "another")
        _, record = attempts.claim(str(tmp_path), whole, {}, "embed")
        record.status = status
        if ended_s_ago is not None:
            record.ended = (datetime.now(UTC) - timedelta(seconds=ended_s_ago)).isoformat()
        attempts.note(str(tmp_path), record, {})
    slept: list[tuple[float, int]] = []
    files = tmp_path / "attempts"
    monkeypatch.setattr("time.sleep", lambda seconds: slept.append((seconds, len(list(files.iterdir())))))
    attempts.claim(str(tmp_path), whole, {}, "embed")
    assert slept == ([(attempts._SETTLE_S, 2)] if waits else []), "once the new attempt turns the old one away"


def test_what_a_later_version_recorded_is_read_as_far_as_it_is_known(tmp_path: Path) -> None:
    _, record = attempts.claim(str(tmp_path), Shard(index=0, count=1), {}, "embed")
    (file,) = (tmp_path / "attempts").iterdir()
    file.write_text(json.dumps({**record.model_dump(mode="json"), "carbon_kg": 1.0}))
    assert attempts.read_attempts(str(tmp_path), {}) == [record]


@pytest.mark.parametrize("shards", [(0, 1), (1, 0)])
def test_no_attempt_waits_for_one_on_other_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: tuple[int, int]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    for index in shards:
        attempts.claim(str(tmp_path), Shard(index=index, count=2), {}, "embed")
    assert slept == []


def test_what_is_known_to_be_over_does_not_run(tmp_path: Path) -> None:
    def opened(number: int, shard: int, **more: object) -> AttemptRecord:
        values = {"attempt": number, "shard_index": shard, "shard_count": 2, "started": "2026-01-01T00:00:00+00:00"}
        return AttemptRecord.model_validate({**values, "host": "elsewhere", "pid": 1, **more})

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    records = [
        opened(1, 0, host=socket.gethostname(), pid=ended.pid),
        opened(2, 1),
        opened(3, 1),
        opened(4, 0, status="done"),
        opened(5, 0, host=socket.gethostname(), pid=os.getpid(), started=datetime.now(UTC).isoformat()),
    ]
    assert [record.status for record in as_known(records)] == ["died", "taken over", "running", "done", "running"]


def test_a_directory_that_was_begun_anew_is_not_the_old_ones(tmp_path: Path) -> None:
    whole = Shard(index=0, count=1)
    claim = "import sys; from pipeline.sinks.attempts import claim; from schemas.values import Shard; "
    claim += "claim(sys.argv[1], Shard(index=0,count=1), {}, 'embed')"
    old, record = attempts.claim(str(tmp_path), whole, {}, "embed")
    shutil.rmtree(tmp_path / "attempts")
    with pytest.raises(OutputError, match="attempt 1 is no longer that of this job"):
        old.check()
    subprocess.run([sys.executable, "-c", claim, str(tmp_path)], check=True)
    new = (tmp_path / "attempts" / "000001.json").read_text()
    with pytest.raises(OutputError, match="was deleted or begun anew while it ran"):
        old.check()
    with pytest.raises(OutputError, match="was deleted or begun anew while it ran"):
        attempts.finish(str(tmp_path), record, {})
    assert (tmp_path / "attempts" / "000001.json").read_text() == new


def test_the_order_of_a_listing_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = Shard(index=0, count=2)
    old, record = attempts.claim(str(tmp_path), left, {}, "embed")
    attempts.finish(str(tmp_path), record, {})
    attempts.claim(str(tmp_path), left, {}, "embed")
    attempts.claim(str(tmp_path), Shard(index=1, count=2), {}, "embed")
    monkeypatch.setattr(attempts, "_numbers", lambda fs, path: [3, 2, 1])
    with pytest.raises(OutputError, match=r"attempt 2 .* has taken over"):
        old.check()


def test_shards_do_not_fence_each_other(tmp_path: Path) -> None:
    left, _ = attempts.claim(str(tmp_path), Shard(index=0, count=2), {}, "embed")
    right, _ = attempts.claim(str(tmp_path), Shard(index=1, count=2), {}, "embed")
    left.check()
    attempts.claim(str(tmp_path), Shard(index=3, count=4), {}, "embed")
    left.check()
    with pytest.raises(OutputError):
        right.check()


def test_a_living_attempt_is_not_overrun(tmp_path: Path) -> None:
    claim = "import sys,time; from pipeline.sinks.attempts import claim; from schemas.values import Shard; "
    claim += "claim(sys.argv[1], Shard(index=0,count=1), {}, 'embed'); print('in', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", claim, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(OutputError, match=f"process {other.pid} has been writing"):
            attempts.claim(str(tmp_path), Shard(index=0, count=1), {}, "embed")
        other.kill()
        other.wait()
    fence, _ = attempts.claim(str(tmp_path), Shard(index=0, count=1), {}, "embed")
    assert fence.number == 2


def test_a_clock_that_is_set_kills_no_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In seconds since 1970 a process began as much later as the clock was set forward meanwhile."""
    _, record = attempts.claim(str(tmp_path), Shard(index=0, count=1), {}, "embed")
    assert is_alive(record.model_copy(update={"process": None})), "as earlier versions wrote it"
    assert not is_alive(record.model_copy(update={"process": f"{record.process}0"})), "another of that number"
    created = psutil.Process.create_time
    monkeypatch.setattr("psutil.Process.create_time", lambda process: created(process) + 3600)
    assert is_alive(record)


def test_a_run_on_another_machine_is_ended_only_on_purpose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Shard(index=0, count=1)
    with monkeypatch.context() as there:
        there.setattr("socket.gethostname", lambda: "another")
        running, record = attempts.claim(str(tmp_path), whole, {}, "embed")
    with pytest.raises(OutputError, match=r"on another\) has been running since .*`compact` would end it"):
        attempts.claim(str(tmp_path), whole, {}, "compact", take_over=False)
    running.check()
    attempts.claim(str(tmp_path), whole, {}, "embed")
    with pytest.raises(OutputError, match="has taken over"):
        running.check()
    attempts.finish(str(tmp_path), record, {})


@pytest.mark.parametrize("question", ["cat_file", "ls"])
def test_a_store_that_does_not_answer_is_told_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, question: str
) -> None:
    class Unreachable(Exception):
        """As the errors of S3's driver, no OSError."""

    def no_answer(*arguments: object, **options: object) -> Any:
        raise Unreachable("could not connect")

    fence, record = attempts.claim(str(tmp_path), Shard(index=0, count=1), {}, "embed")
    monkeypatch.setattr(LocalFileSystem, question, no_answer)
    with pytest.raises(OutputError, match=rf"cannot read {tmp_path}/attempts.*: Unreachable: "):
        fence.check()
    if question == "cat_file":
        with pytest.raises(OutputError, match=rf"cannot read {tmp_path}/attempts/000001.json"):
            attempts.finish(str(tmp_path), record, {})
        record.status = "interrupted"
        attempts.finish(str(tmp_path), record, {})


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    out = str(tmp_path)
    attempts.claim(out, Shard(index=0, count=1), {}, "embed")
    (tmp_path / "attempts/000001.json").write_text("{")
    with pytest.raises(OutputError, match=r"attempts/000001\.json is not the record of an attempt .* remove it"):
        attempts.claim(out, Shard(index=0, count=1), {}, "embed")


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_an_attempt_whose_first_answer_was_lost_is_there_once(
    scheme: str, flaky_proxy: Callable[..., FlakyProxy[Any]], request: pytest.FixtureRequest
) -> None:
    """The driver sends it again and is told that it exists; a second one, never ended, would hold up `compact`."""
    server = request.getfixturevalue("s3_server" if scheme == "s3" else "gcs_server")
    proxy = flaky_proxy(server, [Rule("status", methods=WRITES, first=1, forward=True)])
    out, options = f"{scheme}://{server.make_bucket()}/out", {scheme: proxy.server.storage_options}
    whole = Shard(index=0, count=1)
    fence, record = attempts.claim(out, whole, options, "embed")
    assert proxy.control.faults() == 1
    fence.check()
    record.status = "done"
    attempts.finish(out, record, options)
    assert attempts.read_attempts(out, options) == [record]
    assert attempts.claim(out, whole, options, "compact", take_over=False)[0].number == 2


def test_a_signal_while_writes_are_waited_for_ends_the_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, whole = str(tmp_path), Shard(index=0, count=1)
    with monkeypatch.context() as there:
        there.setattr("socket.gethostname", lambda: "another")
        attempts.claim(out, whole, {}, "embed")
    with monkeypatch.context() as patch:
        patch.setattr("time.sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted), interruptible():
            attempts.claim(out, whole, {}, "embed")
    assert [record.status for record in attempts.read_attempts(out, {})] == ["running", "interrupted"]
    attempts.claim(out, whole, {}, "compact", take_over=False)


def test_a_record_that_stays_empty_hides_no_newer_one(tmp_path: Path) -> None:
    """Where there are no hard links, a kill may come between the file and its data."""
    out = str(tmp_path)
    left, record = attempts.claim(out, Shard(index=0, count=2), {}, "embed")
    empty = tmp_path / "attempts/000002.json"
    empty.touch()
    attempts.claim(out, Shard(index=1, count=2), {}, "embed")
    left.check()
    empty.write_text(record.model_copy(update={"attempt": 2, "shard_count": 1}).model_dump_json())
    with pytest.raises(OutputError, match=r"attempt 2 .* has taken over"):
        left.check()
    empty.write_text("")
    attempts.claim(out, Shard(index=0, count=1), {}, "embed")
    with pytest.raises(OutputError, match=r"attempt 4 .* has taken over"):
        left.check()

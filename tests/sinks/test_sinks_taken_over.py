"""What a dead attempt holds up on another machine than its own, and what once a later one has taken over from it."""

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline.attempt_files import as_known
from pipeline.processes import process_mark
from pipeline.sinks import attempts
from schemas.errors import OutputError
from schemas.values import Shard


@pytest.mark.parametrize(("began_s_ago", "waits"), [(5, True), (600, False)])
def test_what_was_taken_over_holds_up_nobody_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, began_s_ago: int, waits: bool
) -> None:
    out, whole = str(tmp_path), Shard(index=0, count=1)
    with monkeypatch.context() as there:
        there.setattr("socket.gethostname", lambda: "another")
        dead, _ = attempts.claim(out, whole, {}, "embed")
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    _, again = attempts.claim(out, whole, {}, "embed")
    assert slept == [attempts._SETTLE_S]
    again.status = "done"
    again.started = (datetime.now(UTC) - timedelta(seconds=began_s_ago)).isoformat()
    (tmp_path / "attempts/000002.json").write_text(again.model_dump_json())
    slept.clear()
    fence, _ = attempts.claim(out, whole, {}, "compact", take_over=False)
    assert slept == [attempts._SETTLE_S] * waits
    fence.check()
    with pytest.raises(OutputError, match="has taken over from attempt 1"):
        dead.check()


def test_a_run_in_another_container_is_not_dead_for_want_of_its_process_here(tmp_path: Path) -> None:
    """It may have the host name of this one (docker run --network host); its processes cannot be seen."""
    out, whole = str(tmp_path), Shard(index=0, count=1)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    running, record = attempts.claim(out, whole, {}, "embed")
    file = tmp_path / "attempts/000001.json"
    contained = record.model_copy(update={"pid_namespace": "pid:[1]"})
    file.write_text(contained.model_dump_json())
    with pytest.raises(OutputError, match=r", in another container\) has been running since .*`compact` would end it"):
        attempts.claim(out, whole, {}, "compact", take_over=False)
    running.check()
    for namespace, status in (("pid:[1]", "running"), (record.pid_namespace, "died"), (None, "died")):
        gone = record.model_copy(update={"pid": ended.pid, "pid_namespace": namespace})
        assert [known.status for known in as_known([gone])] == [status]
    attempts.claim(out, whole, {}, "embed")
    with pytest.raises(OutputError, match="has taken over"):
        running.check()


@pytest.mark.parametrize("command", ["embed", "compact", "retry"])
def test_the_way_past_a_dead_attempt_is_one_that_leads_past_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """`compact` and `retry` take over from nobody without --force, themselves included."""
    whole = Shard(index=0, count=1)
    with monkeypatch.context() as there:
        there.setattr("socket.gethostname", lambda: "another")
        attempts.claim(str(tmp_path), whole, {}, command)
    own = "run its own command again or " if command == "embed" else ""
    with pytest.raises(OutputError, match=f"if it is dead, {own}give --force$"):
        attempts.claim(str(tmp_path), whole, {}, "compact", take_over=False)


def test_who_is_alive_here_is_not_joined_though_it_was_taken_over(tmp_path: Path) -> None:
    """Its next write is turned away, but until then two jobs would share this machine."""
    whole = Shard(index=0, count=1)
    _, living = attempts.claim(str(tmp_path), whole, {}, "embed")
    living.pid, living.process = os.getppid(), process_mark(os.getppid())
    (tmp_path / "attempts/000001.json").write_text(living.model_dump_json())
    later = living.model_copy(update={"attempt": 2, "host": "another", "status": "done"})
    (tmp_path / "attempts/000002.json").write_text(later.model_dump_json())
    with pytest.raises(OutputError, match=f"process {os.getppid()} has been writing there"):
        attempts.claim(str(tmp_path), whole, {}, "embed")

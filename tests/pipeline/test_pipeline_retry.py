"""What `retry` asks for again is what the directory holds; where it cannot be had, the failures stay as they are."""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.checkpoints import make_checkpoint
from support.ports import LOOPBACK, free_port

from cluster.session import ray_session
from jobs.cli import run_command
from pipeline.maintenance import reopen_failures, status, verify
from pipeline.opening import Opened, open_directory, resolve_job
from pipeline.sinks import attempts
from pipeline.sinks.parts import write_part
from schemas.errors import CheckpointError, ClusterError, OutputError, PatchstreamError, SpecError
from schemas.machines import Machines
from schemas.spec import JobSpec, build_spec
from schemas.tables import FAILURES_SCHEMA
from schemas.values import WHOLE

COMMIT = "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3"
NAME = "somebody/vit"
SERVER = {"url": "grpc://user:hush@host:8001", "model_name": "vit", "headers": {"authorization": "hush"}}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on this machine, with one commit of one model in it."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    model = cache / "models--somebody--vit"
    make_checkpoint(model / "snapshots" / COMMIT, "vit", image_size=32, hidden_size=32, num_attention_heads=2)
    for branch in ("main", "v1"):
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / branch).write_text(COMMIT)
    return model


def failed_run(tmp_path: Path, **values: Any) -> Opened:
    """A run whose one picture failed, as the first attempt leaves it."""
    picture = tmp_path / "a.jpg"
    picture.write_bytes(b"no picture")
    spec = build_spec({"sources": [str(picture)], "model": NAME, "out": str(tmp_path / "out"), **values})
    opened = open_directory(resolve_job(spec))
    row = {"row": 0, "uri": str(picture), "stage": "fetch", "error": "TimedOut", "message": "", "attempts": 4}
    table = pa.Table.from_pylist([{**row, "retryable": True}], FAILURES_SCHEMA)
    write_part(fsspec.filesystem("file"), spec.out, "failures", table, opened.record.part_metadata())
    return opened


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_a_hub_model_is_tried_again_at_its_commit(tmp_path: Path, hub: Path, revision: str | None) -> None:
    opened = failed_run(tmp_path, revision=revision)
    assert opened.record.model.revision == COMMIT
    count, values = reopen_failures(str(tmp_path / "out"), False, {})
    assert (count, values["revision"]) == (1, COMMIT)
    assert open_directory(resolve_job(build_spec(values))).record == opened.record
    assert status(str(tmp_path / "out"), {})["pending"] == 1


@pytest.mark.parametrize(
    ("change", "placement", "error"),
    [
        ("gone", {}, CheckpointError),
        ("another", {}, OutputError),
        ("none", {"gpus_per_actor": -1}, SpecError),
        ("no Ray", {}, ClusterError),
        ("no GPUs", {"gpus_per_actor": 1}, ClusterError),
    ],
)
def test_a_refusal_leaves_the_failures_where_they_are(
    tmp_path: Path, hub: Path, change: str, placement: dict[str, Any], error: type[PatchstreamError]
) -> None:
    failed_run(tmp_path)
    snapshot = hub / "snapshots" / COMMIT
    if change == "gone":
        shutil.rmtree(snapshot)
    elif change == "another":
        make_checkpoint(snapshot, "vit", image_size=32, hidden_size=32, num_attention_heads=2, num_hidden_layers=2)

    def connect(spec: JobSpec) -> Machines:
        if change == "no GPUs":
            return large(gpus=0.0)
        with ray_session(f"{LOOPBACK}:{free_port()}") as machines:
            return machines

    with pytest.raises(error):
        reopen_failures(str(tmp_path / "out"), False, {}, placement, connect=connect)
    assert status(str(tmp_path / "out"), {})["failures"] == 1


def test_no_machine_is_asked_for_while_somebody_writes_there(tmp_path: Path, hub: Path) -> None:
    failed_run(tmp_path)
    out = str(tmp_path / "out")
    _, attempt = attempts.claim(out, WHOLE, {}, "embed")
    attempt.host = "another"
    (tmp_path / "out" / "attempts" / f"{attempt.attempt:06d}.json").write_text(attempt.model_dump_json())

    def connect(spec: JobSpec) -> Machines:
        raise AssertionError("a cluster would grow for it")

    with pytest.raises(OutputError, match=r"on another.* has been running since .*give --force"):
        reopen_failures(out, False, {}, connect=connect)


def test_damaged_failures_are_named(tmp_path: Path, hub: Path) -> None:
    failed_run(tmp_path)
    out = str(tmp_path / "out")
    (part,) = (tmp_path / "out" / "failures").iterdir()
    os.truncate(part, 500)
    for look in (lambda: status(out, {}), lambda: reopen_failures(out, False, {})):
        with pytest.raises(OutputError, match=f"{part} cannot be read"):
            look()


def test_verify_reads_the_manifest_too(tmp_path: Path, hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed_run(tmp_path)
    out = str(tmp_path / "out")
    assert run_command(["verify", out]) == 0
    (part,) = (tmp_path / "out" / "manifest").iterdir()
    place = pq.read_metadata(part).row_group(0).column(1).data_page_offset
    content = part.read_bytes()
    part.write_bytes(content[:place] + bytes(9) + content[place + 9 :])
    assert run_command(["verify", out]) == 1
    assert f"  - cannot read {part}, of the run's manifest" in capsys.readouterr().out
    os.truncate(part, 100)
    for command in ("verify", "status", "retry"):
        assert run_command([command, out]) == 2
        assert f"error: cannot read {part}, of the run's manifest" in capsys.readouterr().err


def test_a_swap_that_was_cut_short_is_no_loss_of_rows(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed_run(tmp_path)
    out = tmp_path / "out"
    (part,) = (out / "failures").iterdir()
    (out / "_swap").mkdir()
    shutil.move(out / "failures", out / "_swap")
    (out / "failures").mkdir()
    (out / "_swap" / "plan.json").write_text(json.dumps({"remove": [], "add": [f"failures/{part.name}"]}))
    monkeypatch.setattr("pipeline.settled._SWAP_S", 0.0)
    for look in (status, verify):
        with pytest.raises(OutputError, match=r"are being rewritten, .* `patchstream compact DIR` finishes"):
            look(str(out), {})
    assert reopen_failures(str(out), False, {})[0] == 1


@pytest.mark.parametrize("left", ["failed", "pending"])
def test_a_run_at_work_on_another_machine_is_ended_only_by_force(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch, run_again: Any, left: str
) -> None:
    failed_run(tmp_path)
    out = str(tmp_path / "out")
    if left == "pending":
        shutil.rmtree(tmp_path / "out" / "failures")
    with monkeypatch.context() as there:
        there.setattr("socket.gethostname", lambda: "another")
        fence, _ = attempts.claim(out, WHOLE, {}, "embed")
    with pytest.raises(OutputError, match=r"on another\) has been running since .* `retry` would end it.* --force"):
        reopen_failures(out, False, {})
    fence.check()
    assert run_again(out, "--force").out == out
    with pytest.raises(OutputError, match="has taken over"):
        fence.check()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Triton server that serves whatever is asked for, in float16."""
    served = SimpleNamespace(dtype="float16", max_batch_size=64)
    monkeypatch.setattr("pipeline.predictors.triton.check_server", lambda info, wanted, spec: served)


def large(gpus: float) -> Machines:
    return Machines(8.0, gpus, 1e9, node_cpus=(8.0,), node_gpus=(gpus,), node_memory=(1e11,))


@pytest.fixture
def run_again(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`retry` from the command line up to the run itself; returns the spec of that."""
    asked: list[Any] = []
    monkeypatch.setattr("cluster.session.ray_session", lambda *given, **more: nullcontext(large(gpus=8.0)))
    monkeypatch.setattr("jobs.run.run_job", lambda values, **_: asked.append(build_spec(values)) or 0)

    def retry(*arguments: object) -> Any:
        assert run_command(["retry", *map(str, arguments)]) == 0
        return asked[-1]

    return retry


def test_limits_and_gpus_are_those_of_the_run(tmp_path: Path, hub: Path, run_again: Any) -> None:
    fetch = {"max_pixels": 400_000_000, "timeout_s": 7.5, "concurrency": 3}
    failed_run(tmp_path, fetch=fetch, gpus_per_actor=0.5, batch_size=96, max_failure_rate=0.25, dtype="float16")
    spec = run_again(tmp_path / "out")
    assert spec.fetch.model_dump(include=set(fetch)) == fetch
    assert (spec.gpus_per_actor, spec.batch_size, spec.max_failure_rate) == (0.5, 96, 0.25)


def test_limits_and_gpus_can_be_changed(tmp_path: Path, hub: Path, run_again: Any) -> None:
    failed_run(tmp_path, fetch={"max_bytes": 5, "concurrency": 3}, gpus_per_actor=1, batch_size=96, dtype="bfloat16")
    limits = ("--timeout", 9, "--max-bytes", 6, "--max-pixels", 7)
    spec = run_again(tmp_path / "out", *limits, "--gpus-per-actor", 0, "--actors", "1:2", "--batch-size", 8)
    assert (spec.fetch.timeout_s, spec.fetch.max_bytes, spec.fetch.max_pixels, spec.fetch.concurrency) == (9, 6, 7, 3)
    assert (spec.gpus_per_actor, spec.actors.max, spec.batch_size) == (0, 2, 8)


def test_machines_that_were_scaled_away_are_waited_for(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed_run(tmp_path, gpus_per_actor=1, dtype="bfloat16")
    asked: list[float] = []
    waited: list[float] = []

    def grown(*given: Any, wait_s: float, **more: Any) -> Any:
        waited.append(wait_s)
        return nullcontext(large(gpus=1.0))

    monkeypatch.setattr("cluster.session.ray_session", grown)
    monkeypatch.setattr("jobs.run.run_job", lambda values, *, wait_s, **_: asked.append(wait_s) or 0)
    assert run_command(["retry", str(tmp_path / "out"), "--cluster-wait", "900"]) == 0
    assert asked == waited == [900]


@pytest.mark.usefixtures("server")
def test_a_server_is_asked_again_and_its_headers_are_kept_nowhere(tmp_path: Path, hub: Path, run_again: Any) -> None:
    failed_run(tmp_path, backend="triton", triton={**SERVER, "outage_s": 2.0})
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and b"hush" in path.read_bytes()]
    spec = run_again(tmp_path / "out", "--triton-header", "authorization: again")
    assert (spec.backend, spec.triton.url, spec.triton.model_name) == ("triton", "grpc://host:8001", "vit")
    assert (spec.triton.headers, spec.triton.outage_s) == ({"authorization": "again"}, 2.0)
    moved = run_again(tmp_path / "out", "--all", "--triton-url", "grpc://other:8001")
    assert (moved.triton.url, moved.triton.model_name) == ("grpc://other:8001", "vit")
    here = run_again(tmp_path / "out", "--all", "--backend", "torch", "--gpus-per-actor", "1")
    assert (here.backend, here.triton, here.dtype) == ("torch", None, "float16")


def test_a_record_of_an_earlier_version_is_tried_again_as_ever(tmp_path: Path, hub: Path, run_again: Any) -> None:
    failed_run(tmp_path)
    place = tmp_path / "out" / "run.json"
    record = json.loads(place.read_text())
    for name in ("fetch", "sink", "backend", "triton", "batch_size", "gpus_per_actor", "max_failure_rate"):
        del record["spec"][name]
    place.write_text(json.dumps(record))
    spec = run_again(tmp_path / "out", "--max-pixels", 7)
    assert (spec.backend, spec.fetch.max_pixels, spec.gpus_per_actor) == ("torch", 7, 0)
    assert status(str(tmp_path / "out"), {})["pending"] == 1


@pytest.mark.parametrize(("retryable", "message"), [(False, "none of its 1 failures"), (None, "has no failures")])
def test_nothing_to_do_is_no_error(
    tmp_path: Path, hub: Path, capsys: pytest.CaptureFixture[str], retryable: bool | None, message: str
) -> None:
    failed_run(tmp_path)
    out = tmp_path / "out"
    (part,) = (out / "failures").iterdir()
    failures = pq.read_table(part)
    if retryable is None:  # the name of a part says that its row is done
        (out / "images").mkdir()
        shutil.move(part, out / "images" / part.name)
    else:
        column = pa.array([retryable])
        pq.write_table(failures.set_column(failures.column_names.index("retryable"), "retryable", column), part)
    assert run_command(["retry", str(out), "--json"]) == 0
    told = capsys.readouterr()
    assert message in told.err
    assert "error:" not in told.err
    assert json.loads(told.out)["pending"] == 0
    shown = json.loads(told.out)
    assert (shown["rows"], shown["report"], shown["attempt"]) == (1, None, None)


@pytest.mark.parametrize(("option", "value"), [("backend", "foo"), ("timeout", -1.0), ("gpus-per-actor", -1.0)])
def test_wrong_options_are_wrong_where_nothing_is_to_be_done(
    tmp_path: Path, hub: Path, capsys: pytest.CaptureFixture[str], option: str, value: object
) -> None:
    failed_run(tmp_path)
    out = tmp_path / "out"
    (out / "images").mkdir()
    (part,) = (out / "failures").iterdir()
    shutil.move(part, out / "images" / part.name)
    assert run_command(["retry", str(out), f"--{option}", str(value)]) == 2
    assert f"(given: {value!r})" in capsys.readouterr().err

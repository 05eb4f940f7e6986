"""Swaps of parts on a store that answers wrongly or late, and with signals in their midst."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from support.faults import Rule
from support.flaky_proxy import FlakyProxy
from support.fleeting import fleeting
from support.gcs import GcsServer
from support.runs import RunContent, run_record

from pipeline.signals import interruptible
from pipeline.sinks import compaction, intervals, ledger
from pipeline.sinks.parts import Part, list_parts, read_columns, write_part
from pipeline.sinks.verify import _check_part, verify
from pipeline.storage import filesystem, put_bytes
from schemas.errors import Interrupted, OutputError

FS = fsspec.filesystem("file")


def three_parts(out: Path) -> None:
    for start in (0, 3, 6):
        write_part(FS, str(out), "images", pa.table({"row": list(range(start, start + 3))}), b"{}")


def rows_in(out: Path) -> list[int]:
    return sorted(row for file in (out / "images").glob("*.parquet") for row in pq.read_table(file)["row"].to_pylist())


@pytest.mark.parametrize("where", ["_swap/images/", "/images/"])
@pytest.mark.parametrize("what", ["an error", "a signal"])
def test_a_look_that_fails_in_the_middle_of_a_swap_ends_it_for_the_time_being(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, what: str
) -> None:
    """A disk whose look-up fails has not said that the file is not there."""
    three_parts(tmp_path)
    info = LocalFileSystem.info
    failed: list[str] = []

    def failing_once(fs: LocalFileSystem, path: str, **kwargs: Any) -> Any:
        name = str(path)
        planned = (tmp_path / "_swap" / "plan.json").exists()
        if planned and not failed and where in name and ("_swap" in where or "_swap" not in name):
            failed.append(name)
            if what == "an error":
                raise OSError(116, "Stale file handle", name)
            os.kill(os.getpid(), signal.SIGTERM)
        return info(fs, path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "info", failing_once)
        with pytest.raises(OutputError if what == "an error" else Interrupted), interruptible():
            compaction.compact(str(tmp_path), 1 << 20, {})
    assert failed
    compaction.recover(str(tmp_path), {})
    assert rows_in(tmp_path) == list(range(9))
    assert not (tmp_path / "_swap").exists()


def test_a_plan_that_comes_after_the_lock_was_lost_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The store was away while the plan was being written: the next holder has cleared the staged parts away."""
    three_parts(tmp_path)
    put_bytes = compaction.put_bytes

    def late(fs: LocalFileSystem, path: str, data: bytes) -> None:
        if path.endswith("plan.json"):
            fs.rm(str(tmp_path / "_swap"), recursive=True)
            (tmp_path / "_swapping").write_text('{"holder": "another"}')
        put_bytes(fs, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(compaction, "put_bytes", late)
        with pytest.raises(OutputError, match="went to another job"):
            compaction.compact(str(tmp_path), 1 << 20, {})
    assert rows_in(tmp_path) == list(range(9))
    (tmp_path / "_swapping").unlink()
    assert len(json.loads((tmp_path / "_swap" / "plan.json").read_text())["remove"]) == 3
    compaction.recover(str(tmp_path), {})
    assert rows_in(tmp_path) == list(range(9))
    assert "came too late; the parts stay as they are" in caplog.text
    assert not (tmp_path / "_swap").exists()
    assert compaction.compact(str(tmp_path), 1 << 20, {}) == 3
    assert [part.rows for part in list_parts(FS, str(tmp_path))] == [9]


@pytest.mark.parametrize("damage", ["cut off", "one bit"])
def test_a_damaged_part_is_named_and_not_merged(tmp_path: Path, damage: str) -> None:
    three_parts(tmp_path)
    (part,) = (tmp_path / "images").glob("part-000000000003-*")
    content = part.read_bytes()
    place = content.index(b"(\xb5/\xfd") + 12  # of zstd's first frame: into the rows themselves
    damaged = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    damaged = damaged if damage == "one bit" else content[:-100]
    part.write_bytes(damaged)
    with pytest.raises(OutputError, match=rf"{part} cannot be read .* delete it"):
        compaction.compact(str(tmp_path), 1 << 20, {})
    assert part.read_bytes() == damaged
    part.unlink()
    assert compaction.compact(str(tmp_path), 1 << 20, {}) == 2
    assert rows_in(tmp_path) == [0, 1, 2, 6, 7, 8]


def test_a_part_that_goes_before_it_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three_parts(tmp_path)
    merge = compaction._merge

    def overtaken(fs: LocalFileSystem, out: str, group: list[Part]) -> pa.Table:
        os.unlink(tmp_path / group[1].path)
        return merge(fs, out, group)

    monkeypatch.setattr(compaction, "_merge", overtaken)
    with pytest.raises(OutputError, match="a part has gone since it was listed"):
        compaction.compact(str(tmp_path), 1 << 20, {})


@pytest.mark.parametrize("begun", ["before the look", "after the look"])
def test_rows_that_a_swap_hides_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: str) -> None:
    three_parts(tmp_path)
    part = next((tmp_path / "images").iterdir())

    def begin() -> None:
        (tmp_path / "_swap" / "images").mkdir(parents=True)
        part.rename(tmp_path / "_swap" / "images" / part.name)
        plan = {"remove": [], "add": [f"images/{part.name}"]}
        (tmp_path / "_swap" / "plan.json").write_text(json.dumps(plan))

    def read_late(*arguments: Any, **options: Any) -> ledger.Ledger:
        if not waits and begun == "after the look":
            begin()
        return read_ledger(*arguments, **options)

    def end(seconds: float) -> None:
        waits.append(seconds)
        compaction.recover(str(tmp_path), {})

    waits: list[float] = []
    read_ledger = ledger.read_ledger
    if begun == "before the look":
        begin()
    monkeypatch.setattr(ledger, "read_ledger", read_late)
    monkeypatch.setattr("time.sleep", end)
    assert ledger.settled_ledger(str(tmp_path), {}).images.tolist() == [[0, 9]]
    assert len(waits) == 1


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_store_that_goes_away_is_named(
    scheme: str, request: pytest.FixtureRequest, log_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drivers have errors of their own for that, not all of them an OSError."""
    with fleeting(request.getfixturevalue("s3_server" if scheme == "s3" else "gcs_server"), log_dir) as store:
        fs, out = filesystem(store.out, store.options)
        for rows in ([0, 1, 2], [4, 6]):
            write_part(fs, out, "images", pa.table({"row": rows}), b"{}")
        parts = list_parts(fs, out)
        record = run_record(RunContent({"cls": np.zeros((5, 2), np.float32)}))

        def leaving(*arguments: Any) -> Iterator[str]:
            yield from _check_part(*arguments)
            store.leave()

        monkeypatch.setattr("pipeline.sinks.verify._check_part", leaving)
        for look in (
            lambda: verify(store.out, record, intervals.EMPTY, pa.schema([]), store.options),
            lambda: list_parts(fs, out),
            lambda: read_columns(fs, out, parts[0]),
            lambda: ledger.read_ledger(store.out, store.options),
            lambda: ledger.settled_ledger(store.out, store.options),
            lambda: compaction.recover(store.out, store.options),
        ):
            with pytest.raises(
                OutputError, match=rf"{out}.*(Could not connect to the endpoint URL|injected by the test)"
            ):
                look()


@pytest.mark.parametrize("path", ["*", "*/images/*", "*_swap/images/*"])
def test_a_store_that_goes_away_in_the_middle_of_a_swap_is_named(
    gcs_server: GcsServer, log_dir: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    with fleeting(gcs_server, log_dir) as store:
        fs, out = filesystem(store.out, store.options)
        for rows in ([0, 1, 2], [3, 4, 5]):
            write_part(fs, out, "images", pa.table({"row": rows}), b"{}")
        put_bytes = compaction.put_bytes

        def leaving(fs: AbstractFileSystem, place: str, data: bytes) -> None:
            put_bytes(fs, place, data)
            if place.endswith("plan.json"):
                store.leave(path)

        with monkeypatch.context() as patch:
            patch.setattr(compaction, "put_bytes", leaving)
            patch.setattr("pipeline.lock._BEAT_S", 0.2)
            with pytest.raises(OutputError, match=rf"cannot (read|write) {out}.*injected by the test"):
                compaction.compact(store.out, 1 << 20, store.options)
            store.leave("nothing")
            compaction.recover(store.out, store.options)
        assert [part.rows for part in list_parts(fs, out)] == [6]


@pytest.mark.timeout(120)
def test_a_removal_whose_answer_was_lost_ends_no_swap(
    gcs_server: GcsServer, flaky_proxy: Callable[..., FlakyProxy[GcsServer]]
) -> None:
    """gcsfs sends it again, and hears that there is nothing: an old part, what was staged, the plan."""
    proxy = flaky_proxy(gcs_server, [Rule("status", "*/out/*", methods=("DELETE",), first=1, forward=True)])
    place, options = f"gs://{gcs_server.make_bucket()}/out", {"gs": proxy.server.storage_options}
    fs, out = filesystem(place, options)
    for rows in ([0, 1, 2], [3, 4, 5]):
        write_part(fs, out, "images", pa.table({"row": rows}), b"{}")
    put_bytes(fs, f"{out}/_swap/images/left.parquet", b"of a swap that never began")
    assert compaction.compact(place, 1 << 20, options) == 2
    assert [part.rows for part in list_parts(fs, out)] == [6]
    assert fs.find(f"{out}/_swap") == []
    spoilt = [target.partition("?")[0] for _, target, _, fault in proxy.control.stats()["log"] if fault]
    assert sorted(target.rpartition(".")[2] for target in spoilt if "." in target) == ["json", *["parquet"] * 4]

"""On Azure the container stands in front of the account, where elsewhere a user does: `abfss://container@account/…`."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from support.runs import RunContent, run_record
from support.source_rows import spec_of

from pipeline.record import check_same, recorded_spec
from pipeline.sinks.parts import split
from pipeline.sources.columns import content_table
from pipeline.sources.manifest import write_manifest
from pipeline.sources.update import new_and_changed
from pipeline.storage import filesystem
from schemas.errors import OutputError
from schemas.tables import images_schema, predicted_schema

CATS, DOGS = (f"abfss://{container}@account.dfs.core.windows.net/1.jpg" for container in ("cats", "dogs"))


def test_an_update_takes_up_what_another_container_holds(tmp_path: Path) -> None:
    out = str(tmp_path)
    parts = write_manifest([content_table([CATS], {})], out, {})
    listed = content_table([DOGS, CATS], {})
    (fresh,) = new_and_changed([listed], out, parts, lambda rows: np.ones(len(rows), bool), {})
    assert fresh["uri"].to_pylist() == [DOGS]
    assert fresh["replaces"].to_pylist() == [None]


def test_a_run_over_another_container_is_another_run() -> None:
    record = run_record(RunContent({"cls": np.ones((1, 4), np.float32)}))
    cats, dogs = (record.model_copy(update={"spec": recorded_spec(spec_of(source))}) for source in (CATS, DOGS))
    with pytest.raises(OutputError, match=r"sources.*cats@account.*dogs@account"):
        check_same(cats, dogs, "out")


def test_the_output_tells_containers_apart() -> None:
    rows = [{"row": 0, "uri": CATS}, {"row": 1, "uri": DOGS}]
    images, _ = split(pa.Table.from_pylist(rows, schema=predicted_schema([], [])), images_schema([], []))
    assert images["uri"].to_pylist() == [CATS, DOGS]


class _KeepsListings(MemoryFileSystem):  # type: ignore[misc]
    """Lists as Azure's driver does: from what it found before, whatever `refresh` says, unless it may keep nothing."""

    protocol = ("abfs",)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        if path in self.dircache:
            return self.dircache[path] if detail else [entry["name"] for entry in self.dircache[path]]
        found = super().ls(path, detail=True)
        self.dircache[path] = found
        return found if detail else [entry["name"] for entry in found]


def test_no_listing_is_kept_from_what_another_process_writes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_registry, "abfs", _KeepsListings)
    fs, folder = filesystem("abfs://features/run/attempts", {})
    fs.pipe_file(f"{folder}/000001.json", b"{}")
    assert len(fs.ls(folder, refresh=True)) == 1
    fs.pipe_file(f"{folder}/000002.json", b"{}")  # as another process would: the driver hears nothing of it
    assert len(fs.ls(folder, refresh=True)) == 2

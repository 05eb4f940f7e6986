"""Freezing: what ends up under manifest/, after interruptions too."""

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.faults import Rule
from support.flaky_proxy import FlakyProxy
from support.gcs import GcsServer

from pipeline.sources import manifest
from pipeline.sources.columns import content_table
from pipeline.sources.manifest import check_parts, part_named, read_rows, read_schema, write_manifest
from pipeline.sources.update import replaced_rows
from pipeline.storage import filesystem
from schemas.errors import OutputError, SourceError
from schemas.tables import MANIFEST_FIELDS


def rows(first: int, stop: int, **user: list[object]) -> pa.Table:
    return content_table([f"s3://b/{number:06d}.jpg" for number in range(first, stop)], {}, pa.table(user))


def on_disk(out: Path) -> pa.Table:
    """What a glob over the folder shows a reader who knows nothing of us."""
    files = sorted((out / "manifest").iterdir())
    return pa.concat_tables([pq.read_table(file) for file in files])


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "PART_ROWS", 100)
    monkeypatch.setattr(manifest, "GROUP_ROWS", 30)


@pytest.mark.usefixtures("small_parts")
def test_rows_are_dense_whatever_the_batches(tmp_path: Path) -> None:
    sizes = [1, 99, 0, 100, 250, 3]
    edges = np.cumsum([0, *sizes])
    tables = [rows(start, stop) for start, stop in pairwise(edges.tolist())]
    parts = write_manifest(tables, str(tmp_path), {})
    table = on_disk(tmp_path)
    assert table["row"].to_pylist() == list(range(453))
    assert table["uri"].to_pylist() == [f"s3://b/{number:06d}.jpg" for number in range(453)]
    assert table.schema.equals(pa.schema(MANIFEST_FIELDS))
    assert [(part.first, part.stop) for part in parts][-1][1] == 453
    assert parts == [part_named(path.name) for path in sorted((tmp_path / "manifest").iterdir())]
    spans = np.array([[0, 1], [95, 105], [449, 453]])
    assert pa.concat_tables(read_rows(str(tmp_path), parts, spans, {}))["row"].to_pylist() == [
        *(0, *range(95, 105), *range(449, 453))
    ]


def test_long_texts_make_shorter_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "PART_BYTES", 100_000)
    tables = [rows(start, start + 10, caption=["x" * 2000] * 10) for start in range(0, 200, 10)]
    parts = write_manifest(tables, str(tmp_path), {})
    assert len(parts) == 4
    monkeypatch.setattr(manifest, "GROUP_BYTES", 20_000)
    (part,) = write_manifest(tables[:4], str(tmp_path / "groups"), {})
    assert pq.read_metadata(tmp_path / "groups" / "manifest" / part.name).num_row_groups > 3
    assert on_disk(tmp_path)["row"].to_pylist() == list(range(200))


@pytest.mark.usefixtures("small_parts")
def test_all_parts_have_the_same_columns(tmp_path: Path) -> None:
    tables = [
        rows(0, 100),
        rows(100, 200, n=[1] * 100, empty=[None] * 100),
        rows(200, 300, n=[0.5] * 100, box=[{"x": 1}] * 100),
        rows(300, 310, box=[{"y": "a"}] * 10),
    ]
    parts = write_manifest(tables, str(tmp_path), {})
    schemas = {str(read_schema(str(tmp_path), part, {})) for part in parts}
    assert len(schemas) == 1
    table = on_disk(tmp_path)
    assert table.schema.field("n").type == pa.float64()
    assert table.schema.field("empty").type == pa.string()
    assert table.slice(299, 2).select(["n", "box"]).to_pylist() == [
        {"n": 0.5, "box": {"x": 1, "y": None}},
        {"n": None, "box": {"x": None, "y": "a"}},
    ]


@pytest.mark.usefixtures("small_parts")
def test_before_each_change_it_is_asked_whether_it_may_be_made(tmp_path: Path) -> None:
    for name in ("manifest-000000000000-000000000100.parquet", "manifest-000000000100-000000000150-0a1b2c3d.parquet"):
        (tmp_path / "manifest").mkdir(exist_ok=True)
        (tmp_path / "manifest" / name).write_text("left behind")
    seen: list[dict[str, bytes]] = []

    def look() -> None:
        seen.append({path.name: path.read_bytes() for path in (tmp_path / "manifest").iterdir()})

    parts = write_manifest([rows(0, 100), rows(100, 210, n=[1] * 110)], str(tmp_path), {}, check=look)
    look()
    changes = [{name for name, _ in before.items() ^ after.items()} for before, after in pairwise(seen)]
    assert [len(names) for names in changes] == [1] * 6, "two removed, three stored, one given a column more"
    assert set(seen[-1]) == {part.name for part in parts}


@pytest.mark.usefixtures("small_parts")
def test_what_a_freeze_that_was_cut_short_left_is_gone(tmp_path: Path) -> None:
    def breaks_off() -> Iterator[pa.Table]:
        yield rows(0, 250)
        raise SourceError("the bucket went away")

    with pytest.raises(SourceError):
        write_manifest(breaks_off(), str(tmp_path), {})
    assert len(list((tmp_path / "manifest").iterdir())) > 0
    (tmp_path / "manifest" / "notes.txt").write_text("not ours")
    (part,) = write_manifest([rows(0, 70)], str(tmp_path), {})
    names = sorted(path.name for path in (tmp_path / "manifest").iterdir())
    assert names == [part.name, "notes.txt"]
    assert re.fullmatch(r"manifest-000000000000-000000000070-[0-9a-f]{8}\.parquet", part.name)


def test_leftovers_of_an_update_go_and_the_record_stays(tmp_path: Path) -> None:
    first = write_manifest([rows(0, 50)], str(tmp_path), {})
    write_manifest([rows(50, 80)], str(tmp_path), {}, first_row=50)
    second = write_manifest([rows(50, 60)], str(tmp_path), {}, first_row=50)
    assert [*first, *second] == [part_named(path.name) for path in sorted((tmp_path / "manifest").iterdir())]
    assert [part[1:] for part in second] == [(50, 60)]
    assert second[0].name.startswith("manifest-000000000050-000000000060-")


def test_later_parts_keep_to_the_schema_of_the_first(tmp_path: Path) -> None:
    (first,) = write_manifest([rows(0, 5, n=[1] * 5, text=["x"] * 5)], str(tmp_path), {})
    schema = read_schema(str(tmp_path), first, {})
    (second,) = write_manifest([rows(5, 6, text=["y"])], str(tmp_path), {}, first_row=5, schema=schema)
    assert read_schema(str(tmp_path), second, {}) == schema
    with pytest.raises(OutputError, match=r"now carry columns \(new\).* start a new --out"):
        write_manifest([rows(6, 7, new=[1])], str(tmp_path), {}, first_row=6, schema=schema)
    with pytest.raises(OutputError, match="does not hold what it did"):
        write_manifest([rows(6, 7, n=["seven"])], str(tmp_path), {}, first_row=6, schema=schema)
    with pytest.raises(OutputError, match=r"column `n` of .*, int64, when .*'seven'.*\); start a new --out"):
        write_manifest([rows(6, 7, n=["seven"])], str(tmp_path), {}, first_row=6, schema=schema)
    with pytest.raises(
        OutputError, match=r"column `n` of .* lose its zeros\); write `n` without zeros .* or start a new"
    ):
        write_manifest([rows(6, 7, n=["007"])], str(tmp_path), {}, first_row=6, schema=schema)
    assert on_disk(tmp_path)["row"].to_pylist() == list(range(6))


def test_no_tables_no_parts(tmp_path: Path) -> None:
    assert write_manifest([], str(tmp_path), {}) == []


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("damage", ["gone", "cut off", "one bit"])
def test_a_part_that_cannot_be_read_is_named(tmp_path: Path, damage: str) -> None:
    out = str(tmp_path)
    parts = write_manifest([rows(0, 250)], out, {})
    assert check_parts(out, parts, {}) == []
    file = tmp_path / "manifest" / parts[1].name
    content = bytearray(file.read_bytes())
    chunk = pq.read_metadata(file).row_group(1).column(1)
    content[chunk.dictionary_page_offset + chunk.total_compressed_size - 5] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content if damage == "one bit" else content[:-50])
    (problem,) = check_parts(out, parts, {})
    message = rf"cannot read {file}, .* What was committed stays.* put back a copy of it, or start a new --out"
    assert re.fullmatch(message, problem)
    with pytest.raises(OutputError, match=message):
        list(read_rows(out, parts, np.array([[140, 150]]), {}))
    if damage != "one bit":
        for read in (lambda: read_schema(out, parts[1], {}), lambda: replaced_rows(out, parts, {})):
            with pytest.raises(OutputError, match=message):
                read()


def test_rows_under_the_name_of_others_are_noticed(tmp_path: Path) -> None:
    (part,) = write_manifest([rows(0, 5)], str(tmp_path), {})
    other = "manifest-000000000000-000000000006.parquet"
    (tmp_path / "manifest" / part.name).rename(tmp_path / "manifest" / other)
    (problem,) = check_parts(str(tmp_path), [part_named(other)], {})
    assert problem.endswith("-000000000006.parquet: the rows in it are not those that its name stands for")


def test_a_removal_of_leftovers_whose_answer_was_lost_ends_no_freeze(
    gcs_server: GcsServer, flaky_proxy: Callable[..., FlakyProxy[GcsServer]]
) -> None:
    """gcsfs sends it again, and hears that there is nothing."""
    proxy = flaky_proxy(gcs_server, [Rule("status", methods=("DELETE",), first=1, forward=True)])
    out, options = f"gs://{gcs_server.make_bucket()}/out", {"gs": proxy.server.storage_options}
    (left,) = write_manifest([rows(0, 9)], out, options)
    (part,) = write_manifest([rows(0, 5)], out, options)
    assert proxy.control.faults() == 1
    fs, path = filesystem(out, options)
    assert [name.rpartition("/")[2] for name in fs.find(f"{path}/manifest")] == [part.name] != [left.name]

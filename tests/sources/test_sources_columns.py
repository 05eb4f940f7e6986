"""The user's own columns, and tables that hold the image bytes."""

from datetime import UTC, datetime, time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.manifests import decode_all
from support.shards import listed, png, shades
from support.source_rows import FIXED, read, spec_of, uris, write

from pipeline import logs
from pipeline.sources import expand
from pipeline.sources.columns import ColumnMisfit, conformed, content_table
from pipeline.sources.manifest import read_schema, read_sources, write_manifest
from schemas.errors import SourceError

# --- the user's columns


def test_names_that_are_ours_are_given_a_prefix(tmp_path: Path) -> None:
    row = {"uri": "/a.jpg", "row": 1, "size": 2, "cls": "x", "labels": "y", "width": 3, "error": "z", "mine": 4}
    names = ["user_row", "user_size", "user_cls", "user_labels", "user_width", "user_error", "mine"]
    assert read(write(tmp_path / "t.jsonl", [row])).column_names == [*FIXED, *names]
    with pytest.raises(SourceError, match="would both be called `user_row`"):
        read(write(tmp_path / "u.jsonl", [{"uri": "/a.jpg", "row": 1, "user_row": 2}]))


def test_nested_columns_ride_along(tmp_path: Path) -> None:
    rows = [
        {"uri": "/a.jpg", "box": {"x": 1, "y": [1.5, 2.0]}, "tags": ["a", "b"], "none": {}},
        {"uri": "/b.jpg", "box": None, "tags": [], "none": {}},
    ]
    table = read(write(tmp_path / "t.jsonl", rows))
    assert table.select(["uri", "box", "tags"]).to_pylist() == [
        {key: row[key] for key in ("uri", "box", "tags")} for row in rows
    ]
    parts = write_manifest([table], str(tmp_path / "out"), {})
    assert read_schema(str(tmp_path / "out"), parts[0], {}).field("none").type == pa.string()


def test_fields_of_jsonl_may_come_late(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"uri": f"/{number}.jpg", "late": None} for number in range(17_000)]
    rows += [{"uri": "/x.jpg", "late": "here", "new": 1.5}]
    table = read(write(tmp_path / "t.jsonl", rows))
    assert table.slice(17_000).select(["late", "new"]).to_pylist() == [{"late": "here", "new": 1.5}]
    assert table["new"].null_count == 17_000


def test_a_csv_column_that_turns_to_text_is_text_throughout(tmp_path: Path) -> None:
    """Arrow looks at the first block alone; the odd value comes long after it."""
    filler = "x" * 300
    lines = [f"/{number}.jpg,{number},{number},{filler}" for number in range(30_000)]
    (tmp_path / "t.csv").write_text("\n".join(["uri,code,n,filler", *lines, "/last.jpg,A7,8,y"]) + "\n")
    table = read(tmp_path / "t.csv")
    assert (table.schema.field("code").type, table.schema.field("n").type) == (pa.string(), pa.int64())
    assert table.slice(29_999).select(["uri", "code", "n"]).to_pylist() == [
        {"uri": "/29999.jpg", "code": "29999", "n": 29999},
        {"uri": "/last.jpg", "code": "A7", "n": 8},
    ]


@pytest.mark.parametrize("filler", [1, 30_000])
def test_a_csv_column_has_the_first_type_that_holds_all_its_values(
    tmp_path: Path, filler: int, caplog: pytest.LogCaptureFixture
) -> None:
    header = "uri,real,day,moment,zoned,yes,none,clock,hour,bytes,note\n"
    plain = f"/x.jpg,1,2024-01-02,2024-01-02,2024-01-02T03:04:05Z,true,,00:10:00,00:10:00,x,{'x' * 200}\n" * filler
    odd = "/a.jpg, 0.5 ,NA,2024-01-02 03:04:05,2024-01-02 05:04:05+02:00,False,,12:30,x,caf\xe9,NA\n"
    (tmp_path / "t.csv").write_bytes((header + plain + odd).encode("latin-1"))
    (row,) = read(tmp_path / "t.csv").slice(filler).to_pylist()
    utc = datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert (row["real"], row["day"], row["moment"], row["zoned"]) == (0.5, None, utc.replace(tzinfo=None), utc)
    assert (row["yes"], row["none"], row["clock"], row["bytes"], row["note"]) == (
        False,
        None,
        time(12, 30),
        b"caf\xe9",
        "NA",
    )
    assert row["hour"] == "x"
    (told,) = caplog.messages
    assert told.endswith("t.csv: column `bytes` is no UTF-8 and rides along as bytes; save the table as UTF-8")


@pytest.mark.parametrize("filler", [0, 30_000])
def test_identifiers_in_a_csv_that_no_float_holds_are_text(tmp_path: Path, filler: int) -> None:
    """Arrow takes a column of them for floats: neighbours would become equal. Behind much filler, in a late block."""
    lines = [f"/x.jpg,0.5,1e300,18446744073709551616,{'x' * 200}"] * filler
    lines += ["/a.jpg,17293822569102704643,9007199254740993.0,9223372036854775808,"]
    lines += [f"/b.jpg, 17293822569102704644,,-1e20,{'1' * 5000}"]
    (tmp_path / "t.csv").write_text("\n".join(["uri,id,real,round,filler", *lines]) + "\n")
    table = read(tmp_path / "t.csv").slice(filler)
    assert [text.strip() for text in table["id"].to_pylist()] == ["17293822569102704643", "17293822569102704644"]
    assert table.select(["real", "round"]).to_pylist() == [
        {"real": 2.0**53, "round": 2.0**63},
        {"real": None, "round": -1e20},
    ]


def test_views_ride_along_as_plain_columns(tmp_path: Path) -> None:
    """DataFusion writes texts and bytes so; Arrow takes no rows of a table that holds any, which sorting does too."""
    text, blob = pa.string_view(), pa.binary_view()
    columns = {"uri": pa.array(["b.jpg", "/a.jpg"], text), "text": pa.array(["é" * 20, None], text)}
    pq.write_table(pa.table({**columns, "hash": pa.array([b"\xff", b"x" * 20], blob)}), tmp_path / "t.parquet")
    table = read(tmp_path / "t.parquet").sort_by("uri")
    assert table.select(["uri", "text", "hash"]).to_pylist() == [
        {"uri": "/a.jpg", "text": None, "hash": b"x" * 20},
        {"uri": f"{tmp_path}/b.jpg", "text": "é" * 20, "hash": b"\xff"},
    ]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.list_(pa.string_view()), ["a", None]),
        (pa.large_list(pa.binary_view()), [b"a"]),
        (pa.list_view(pa.string_view()), ["a"]),
        (pa.list_(pa.string_view(), 2), ["a", "b"]),
        (pa.struct([("a", pa.string_view()), ("b", pa.list_(pa.binary_view()))]), {"a": "x", "b": [b"y"]}),
        (pa.map_(pa.string_view(), pa.list_(pa.binary_view())), [("a", [b"b"])]),
    ],
)
def test_views_at_any_depth(kind: pa.DataType, value: Any) -> None:
    table = content_table(["/b.jpg", "/a.jpg"], {}, pa.table({"x": pa.array([value, None], kind)}))
    assert table.sort_by("uri")["x"].to_pylist() == [None, value]


def test_sources_with_different_columns_share_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "z.jpg").write_bytes(b"x")
    one = write(tmp_path / "a.csv", [{"uri": "/a.jpg", "n": 1, "only_a": "x"}])
    two = write(tmp_path / "b.jsonl", [{"uri": "/b.jpg", "n": 2.5, "only_b": True}])
    table = read(one, two, tmp_path / "z.jpg")
    assert table.select(["n", "only_a", "only_b"]).to_pylist() == [
        {"n": 1.0, "only_a": "x", "only_b": None},
        {"n": 2.5, "only_a": None, "only_b": True},
        {"n": None, "only_a": None, "only_b": None},
    ]


def test_a_column_that_is_text_here_and_a_number_there_is_an_error(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", [{"uri": "/a.jpg", "n": 1.5}])
    two = write(tmp_path / "b.jsonl", [{"uri": "/b.jpg", "n": "one"}])
    with pytest.raises(SourceError, match=r"do not agree .* n .*double.*string"):
        write_manifest(read_sources(spec_of(one, two)), str(tmp_path / "out"), {})
    with pytest.raises(SourceError, match=r"column `n` does not hold one kind of value"):
        read(write(tmp_path / "c.jsonl", [{"uri": "/a", "n": 1}, {"uri": "/b", "n": "x"}]))
    with pytest.raises(SourceError, match=r"c\.jsonl: column `n` holds a whole number beyond 64 bits"):
        read(write(tmp_path / "c.jsonl", [{"uri": "/a", "n": 1 << 63}]))
    (tmp_path / "d.jsonl").write_text('{"uri": "/a"}\n["/b"]\n')
    with pytest.raises(SourceError, match="line 2: a JSON object is needed"):
        read(tmp_path / "d.jsonl")


@pytest.mark.parametrize("between", [0, 40_000])
@pytest.mark.parametrize("values", [(7, "007"), ("007", 7)])
def test_whole_numbers_and_text_in_a_jsonl_are_an_error_wherever_they_stand(
    tmp_path: Path, values: tuple[Any, Any], between: int
) -> None:
    """Lines are read some thousand at a time."""
    first, last = ({"uri": "/a.jpg", "id": value} for value in values)
    path = write(tmp_path / "t.jsonl", [first, *[{"uri": "/b.jpg", "id": None}] * between, last])
    with pytest.raises(
        SourceError, match=r"t\.jsonl: column `id` does not hold one kind of value .* give it one in all"
    ):
        read(path)


def test_identifiers_are_text_in_all_sources_where_they_are_in_one(tmp_path: Path) -> None:
    """Of one table in two files, one happens to hold none that begins with a zero."""
    (tmp_path / "a.csv").write_text("uri,id\n/a.jpg,100000\n")
    (tmp_path / "b.csv").write_text("uri,id\n/b.jpg,000139\n")
    for order in (("a", "b"), ("b", "a")):
        table = read(*(tmp_path / f"{name}.csv" for name in order))
        assert dict(zip(table["uri"].to_pylist(), table["id"].to_pylist(), strict=True)) == {
            "/a.jpg": "100000",
            "/b.jpg": "000139",
        }
    first, second = (read(tmp_path / f"{name}.csv") for name in ("a", "b"))
    assert conformed(first, second.schema)["id"].to_pylist() == ["100000"]
    with pytest.raises(SourceError, match=r"column `id` holds.*007 would lose its zeros"):
        conformed(second, first.schema)
    (tmp_path / "c.csv").write_text("uri,id\n/c.jpg,\n/d.jpg,007\n")
    with pytest.raises(ColumnMisfit) as caught:
        conformed(read(tmp_path / "c.csv"), first.schema)
    assert caught.value.zeros, "an empty cell is no misfit"


def test_a_number_that_no_common_type_holds_is_an_error(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", [{"uri": "/a.jpg", "n": (1 << 53) + 1}])
    two = write(tmp_path / "b.jsonl", [{"uri": "/b.jpg", "n": 0.5}])
    for tables in (read_sources(spec_of(one, two)), (read(one), read(two))):  # in one part, in two
        with pytest.raises(SourceError, match=r"column `n` holds: int64 in one, .* the double that all"):
            write_manifest(tables, str(tmp_path / "out"), {})


# --- image bytes


def images(path: Path, column: str = "image", **others: list[Any]) -> Path:
    pq.write_table(pa.table({column: pa.array([b"1", b"2", None], pa.binary()), **others}), path)
    return path


def test_rows_of_image_bytes(tmp_path: Path) -> None:
    path = images(tmp_path / "t.parquet", label=["x", "y", "z"])
    table = read(path)
    assert table.select(["uri", "container", "offset", "length", "label"]).to_pylist() == [
        {"uri": f"{path}#{row}", "container": str(path), "offset": row, "length": None, "label": label}
        for row, label in enumerate("xyz")
    ]
    assert len(set(table["etag"].to_pylist())) == 1
    assert table["etag"].null_count == 0
    assert "image" not in table.column_names
    assert uris(images(tmp_path / "u.parquet", "photo")) == [f"{tmp_path}/u.parquet#{row}" for row in range(3)]


def test_the_struct_of_hugging_face_datasets(tmp_path: Path) -> None:
    values = [
        {"bytes": b"1", "path": "one.jpg"},
        {"bytes": b"2", "path": None},
        {"bytes": None, "path": "s3://b/3.jpg"},
    ]
    pq.write_table(pa.table({"image": values, "label": [1, 2, 3]}), tmp_path / "t.parquet")
    table = read(tmp_path / "t.parquet")
    base = f"{tmp_path}/t.parquet#"
    assert table["uri"].to_pylist() == [f"{base}one.jpg", f"{base}1", f"{base}s3://b/3.jpg"]
    assert table.column_names == [*FIXED, "label"]


@pytest.mark.parametrize("nested", [False, True])
def test_image_bytes_as_views(tmp_path: Path, nested: bool) -> None:
    blob, values = pa.binary_view(), [png(7), png(8)]
    column = pa.array(values, blob)
    if nested:
        struct = pa.struct([("bytes", blob), ("path", pa.string_view())])
        column = pa.array([{"bytes": value, "path": None} for value in values], struct)
    pq.write_table(pa.table({"image": column}), tmp_path / "t.parquet")
    assert shades(decode_all(listed(str(tmp_path / "t.parquet")))) == [7, 8]


def test_bytes_go_before_addresses_where_they_are_called_image(tmp_path: Path) -> None:
    path = images(tmp_path / "t.parquet", uri=["s3://b/1.jpg", None, "3.jpg"])
    table = read(path)
    assert table["uri"].to_pylist() == ["s3://b/1.jpg", f"{path}#1", f"{tmp_path}/3.jpg"]
    assert table["offset"].to_pylist() == [0, 1, 2]
    other = images(tmp_path / "u.parquet", "hash", uri=["/1.jpg", "/2.jpg", "/3.jpg"])
    assert read(other).select(["uri", "container", "hash"]).to_pylist()[0] == {
        **{"uri": "/1.jpg", "container": None, "hash": b"1"}
    }


def test_of_several_byte_columns_one_must_be_named(tmp_path: Path) -> None:
    path = images(tmp_path / "t.parquet", "left", right=[b"1", b"2", b"3"])
    with pytest.raises(SourceError, match="--image-column"):
        read(path)
    assert len(uris(path, image_column="left")) == 3


def test_bytes_of_another_column_than_the_one_asked_for_are_not_taken(tmp_path: Path) -> None:
    path = images(tmp_path / "t.parquet", "jpg")
    assert len(uris(path)) == 3
    with pytest.raises(SourceError, match=r"nor one column with image bytes .`jpeg` is none.; name"):
        read(path, image_column="jpeg")


def test_other_pictures_of_a_row_do_not_ride_along(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They would make the manifest a copy of the table. Told once, not for each table."""
    picture, row = {"bytes": b"m", "path": None}, {"image": b"1", "label": 7, "embedding": [0.5], "box": {"x": 1}}
    rows = [{**row, "mask": picture, "edited": b"e", "views": [picture], "pages": [[b"p"]]}]
    for number in range(3):
        write(tmp_path / f"{number}.parquet", rows)
    assert read(tmp_path).column_names == [*FIXED, "label", "embedding", "box"]
    assert [record.message.count("`mask`, `edited`, `views`, `pages`") for record in caplog.records] == [1]
    assert read(tmp_path, image_column="mask").column_names == [*FIXED, "label", "embedding", "box"]
    assert "images are those of column `mask`" in caplog.records[-1].message


def test_row_groups_that_are_read_again_and_again_are_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(expand, "_MANY_BYTES", 1 << 20)
    monkeypatch.setattr(logs, "_told", set())
    for name, rows, size in (("many", 5000, 300), ("small", 5000, 20), ("few", 3000, 1000)):
        bytes_ = [bytes([row % 256]) * size for row in range(rows)]
        table = pa.table({"image": [{"bytes": one, "path": None} for one in bytes_], "n": range(rows)})
        pq.write_table(table, tmp_path / f"{name}.parquet", use_dictionary=False)
    read(tmp_path / "few.parquet", tmp_path / "small.parquet")
    assert not caplog.records
    for _ in range(2):
        read(tmp_path)
    (told,) = [record.message for record in caplog.records]
    assert f"{tmp_path}/many.parquet has row groups of up to 5,000 rows" in told
    assert "about 2 times. Written anew with row_group_size=1000" in told


@pytest.mark.parametrize("column", ["image", "uri"])
def test_long_texts_make_shorter_batches(tmp_path: Path, column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sources.tables._BATCH_BYTES", 100_000)
    first = {"uri": "/a.jpg"} if column == "uri" else {"image": {"bytes": bytes(1000), "path": None}}
    write(tmp_path / "long.parquet", [{**first, "text": f"{number}" + "x" * 2000} for number in range(200)])
    tables = list(read_sources(spec_of(tmp_path / "long.parquet")))
    assert max(len(table) for table in tables) < 60
    assert [text.rstrip("x") for table in tables for text in table["text"].to_pylist()] == [str(n) for n in range(200)]
    write(tmp_path / "short.parquet", [{**first, "text": "x"}] * 200)
    assert len(list(read_sources(spec_of(tmp_path / "short.parquet")))) == 1


def test_image_tables_without_rows_or_with_many(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"image": pa.array([], pa.binary()), "n": pa.array([], pa.int64())}), tmp_path / "0.parquet"
    )
    values = pa.array([b"x"] * 40_000, pa.binary())
    pq.write_table(pa.table({"image": values, "n": range(40_000)}), tmp_path / "1.parquet", row_group_size=7000)
    table = read(tmp_path)
    assert table["offset"].to_pylist() == table["n"].to_pylist() == list(range(40_000))

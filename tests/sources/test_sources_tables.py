"""CSV, TSV, JSONL and Parquet tables of addresses, on disks and in stores that fail."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.faults import Rule
from support.gcs import GcsServer
from support.http_server import HttpServer
from support.s3 import S3Server
from support.source_rows import FIXED, ROWS, read, uris, write

from pipeline.sources.manifest import read_rows, write_manifest
from schemas.errors import SourceError
from schemas.tables import METADATA_KEY

# --- addresses


@pytest.mark.parametrize(
    "name", ["t.csv", "t.tsv", "t.jsonl", "t.ndjson", "t.parquet", "t.CSV", "t.csv.gz", "t.jsonl.gz"]
)
def test_the_other_columns_ride_along(tmp_path: Path, name: str) -> None:
    table = read(write(tmp_path / name))
    assert table.column_names == [*FIXED, "label", "score"]
    assert table.select(["uri", "label", "score"]).to_pylist() == ROWS
    assert table["container"].null_count == table["size"].null_count == 2


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_relative_addresses_begin_at_the_table(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["a.jpg", "sub/b c.jpg", "../up.jpg", "/root/c.jpg", "https://h/d.jpg?x=1", "./e.jpg"]
    folder = tmp_path / "tables"
    folder.mkdir()
    write(folder / name, [{"uri": uri} for uri in given])
    expected = [f"{folder}/a.jpg", f"{folder}/sub/b c.jpg", f"{tmp_path}/up.jpg", *given[3:5], f"{folder}/e.jpg"]
    assert uris(folder / name) == expected
    monkeypatch.chdir(tmp_path)
    assert uris(f"tables/{name}") == uris(f"file://{folder}/{name}") == expected


def test_relative_addresses_in_a_bucket_and_on_the_web(
    tmp_path: Path, s3_server: S3Server, http_server: Callable[..., HttpServer]
) -> None:
    write(tmp_path / "t.csv", [{"uri": "a.jpg"}, {"uri": "../b.jpg"}, {"uri": "s3://c/d.jpg"}])
    base = s3_server.upload(tmp_path, s3_server.make_bucket(), "x/y")
    found = uris(f"{base}/t.csv", storage_options={"s3": s3_server.storage_options})
    assert found == [f"{base}/a.jpg", f"{base.removesuffix('/y')}/b.jpg", "s3://c/d.jpg"]
    (tmp_path / "x/y").mkdir(parents=True)
    write(tmp_path / "x/y/t.csv", [{"uri": "a.jpg"}, {"uri": "../b.jpg"}])
    server = http_server(tmp_path)
    signed = f"{server.url}/x/y/t.csv?X-Amz-Signature=a/b/c"
    assert uris(signed) == [f"{server.url}/x/y/a.jpg", f"{server.url}/x/b.jpg"]


def test_of_relative_addresses_only_dots_in_the_path_are_resolved(
    tmp_path: Path, s3_server: S3Server, gcs_server: GcsServer, http_server: Callable[..., HttpServer]
) -> None:
    """An empty segment belongs to a key, and a query to whoever signed it."""
    given = ["i//1.jpg", "./a/.././b/../c.jpg", "../d.jpg", "../../e.jpg", "i/..", "x?v=a//b/../c", "t?of=https://h/x"]
    write(tmp_path / "t.jsonl", [{"uri": uri} for uri in [*given, "r/?of=../y#z/./"]])
    resolved = ["y//i//1.jpg", "y//c.jpg", "y/d.jpg", "e.jpg", "y//"]
    for server in (s3_server, gcs_server):
        bucket = server.make_bucket()
        table = server.put(bucket, "y//t.jsonl", (tmp_path / "t.jsonl").read_bytes())
        base = table.removesuffix("/y//t.jsonl")
        found = uris(table, storage_options=server.storage_options)
        assert found[:5] == [f"{base}/{name}" for name in resolved]
        assert found[5] == f"{base}/y//" + ("x?v=a//b/../c" if server is s3_server else "x?v=a//c")
        assert uris(server.put(bucket, "t.jsonl", b'{"uri": "i//1.jpg"}'), storage_options=server.storage_options) == [
            f"{base}/i//1.jpg"
        ]
    (tmp_path / "y").mkdir()
    (tmp_path / "t.jsonl").rename(tmp_path / "y/t.jsonl")
    web = http_server(tmp_path).url
    behind = [f"{web}/y//{name}" for name in ("x?v=a//b/../c", "t?of=https://h/x", "r/?of=../y#z/./")]
    for cache in ("", "simplecache::"):
        source = f"{cache}{web}/y//t.jsonl?sig=a/b"
        assert uris(source) == [f"{cache}{uri}" for uri in [*(f"{web}/{name}" for name in resolved), *behind]]


def test_paths_as_hadoop_writes_them_are_absolute(tmp_path: Path, s3_server: S3Server) -> None:
    write(tmp_path / "t.csv", [{"uri": uri} for uri in ("file:/root/a b.jpg", "local:/c.jpg", "file:///d.jpg")])
    base = s3_server.upload(tmp_path, s3_server.make_bucket())
    for folder in (tmp_path, base):
        found = uris(f"{folder}/t.csv", storage_options={"s3": s3_server.storage_options})
        assert found == ["/root/a b.jpg", "/c.jpg", "file:///d.jpg"]


def test_relative_addresses_in_an_archive(tmp_path: Path) -> None:
    given = b"uri\na.jpg\n../b.jpg\n/root/c.jpg\ns3://b/d.jpg\n"
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("t.csv", "in/t.csv"):
            archive.writestr(name, given)
    chain = f"::{tmp_path}/x.zip"
    absolute = ["/root/c.jpg", "s3://b/d.jpg"]
    assert uris(f"zip://in/t.csv{chain}") == [f"zip://in/a.jpg{chain}", f"zip://b.jpg{chain}", *absolute]
    assert uris(f"zip://t.csv{chain}")[0] == f"zip://a.jpg{chain}"
    assert uris(f"zip://in/?.csv{chain}") == uris(f"zip://in/t.csv{chain}")


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_a_row_without_an_address_stays_a_row(tmp_path: Path, name: str) -> None:
    if name == "t.csv":
        (tmp_path / name).write_text("uri,n\na.jpg,1\n,2\n")
    else:
        write(tmp_path / name, [{"uri": "a.jpg", "n": 1}, {"uri": None, "n": 2}])
    assert read(tmp_path / name).select(["uri", "n"]).to_pylist() == [
        {"uri": f"{tmp_path}/a.jpg", "n": 1},
        {"uri": "", "n": 2},
    ]


def test_another_address_column(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", [{"path": "/a.jpg", "uri": 7}])
    assert read(path, uri_column="path").select(["uri", "user_uri"]).to_pylist() == [{"uri": "/a.jpg", "user_uri": 7}]


def test_addresses_that_look_like_numbers_or_are_categories(tmp_path: Path) -> None:
    assert uris(write(tmp_path / "t.csv", [{"uri": "0012"}, {"uri": "13"}])) == [f"{tmp_path}/0012", f"{tmp_path}/13"]
    column = pa.array(["/a.jpg", "/b.jpg", "/a.jpg"]).dictionary_encode()
    pq.write_table(pa.table({"uri": column, "label": column}), tmp_path / "t.parquet")
    table = read(tmp_path / "t.parquet")
    assert table["uri"].to_pylist() == ["/a.jpg", "/b.jpg", "/a.jpg"]
    assert table.schema.field("label").type == pa.string()


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_a_table_without_addresses_is_an_error(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [{"url": "a.jpg", "n": 1}])
    with pytest.raises(SourceError, match=rf"{name} has .*column `uri`.*--uri-column"):
        read(path)
    with pytest.raises(SourceError, match="holds int64, text is needed"):
        read(write(tmp_path / "n.parquet", [{"uri": 1}]))


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet", "t.tsv"])
def test_what_is_no_such_table_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x00\xff\xd8 no table \n\n1,2,3\n")
    with pytest.raises(SourceError, match=f"{tmp_path}/{name}"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl"])
@pytest.mark.parametrize("kind", ["utf-16-le", "utf-16-be"])
def test_a_table_in_utf_16_says_so(tmp_path: Path, name: str, kind: str) -> None:
    text = "\ufeff" + write(tmp_path / name).read_text()
    (tmp_path / name).write_text(text, kind)
    with pytest.raises(SourceError, match=f"{name} is UTF-16; save it as UTF-8"):
        read(tmp_path / name)


def test_a_table_that_is_no_utf8_or_lies_where_a_name_is_none(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("uri,n\ncaf\xe9.jpg,1\n".encode("latin-1"))
    with pytest.raises(SourceError, match=r"t\.csv: column `uri` is no UTF-8; save the table as UTF-8"):
        read(tmp_path / "t.csv")
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(folder)
    write(Path(folder, "t.csv"), [{"uri": "/a.jpg", "n": 1}])
    assert uris(f"{tmp_path}/caf?/t.csv") == ["/a.jpg"]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_a_table_without_rows_matches_nothing(tmp_path: Path, name: str) -> None:
    if name == "t.csv":
        (tmp_path / name).write_text("uri,label\n")
    elif name == "t.jsonl":
        (tmp_path / name).write_text("\n")
    else:
        pq.write_table(pa.table({"uri": pa.array([], pa.string())}), tmp_path / name)
    why = "" if name == "t.jsonl" else "; the tables there have no rows"
    with pytest.raises(SourceError, match=f"no image matches {tmp_path}/{name}{why}; give a file"):
        read(tmp_path / name)
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert uris(tmp_path / name, tmp_path / "a.jpg") == [f"{tmp_path}/a.jpg"]


def test_a_damaged_parquet_table(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [{"uri": f"/{number}.jpg"} for number in range(5000)])
    data = bytearray(path.read_bytes())
    data[100:2000] = bytes(1900)
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"t\.parquet cannot be read as Parquet"):
        read(path)


@pytest.mark.parametrize("name", ["t.csv.gz", "t.jsonl.gz"])
def test_a_damaged_compressed_table(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [{"uri": f"/{hash(number)}.jpg", "n": number} for number in range(5000)])
    data = bytearray(path.read_bytes())
    for damaged in (data[:100] + bytes(range(256)) + data[356:], data[:-5000], data[:-8] + bytes(8)):
        path.write_bytes(damaged)
        with pytest.raises(SourceError, match=rf"{name} cannot be read as"):
            read(path)


def test_a_line_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("[" * 200_000)
    with pytest.raises(SourceError, match=r"t\.jsonl cannot be read as JSONL"):
        read(tmp_path / "t.jsonl")


def test_globs_over_tables_and_the_folder_of_a_table(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"part-{number}.csv", [{"uri": f"/{number}.jpg"}])
    assert uris(f"{tmp_path}/part-*.csv") == ["/0.jpg", "/1.jpg", "/2.jpg"]
    folder = tmp_path / "big.parquet"
    folder.mkdir()
    for number in range(2):
        write(folder / f"part-{number}.parquet", [{"uri": f"/{number}.jpg"}])
    (folder / "_SUCCESS").write_bytes(b"")
    assert uris(folder) == ["/0.jpg", "/1.jpg"]


def test_a_slash_behind_the_folder_of_a_table_changes_nothing(
    tmp_path: Path, s3_server: S3Server, http_server: Callable[..., HttpServer]
) -> None:
    folder = tmp_path / "big.parquet"
    folder.mkdir()
    write(folder / "part-0.parquet", [{"uri": "/0.jpg"}])
    (folder / "_SUCCESS").write_bytes(b"")
    base = s3_server.upload(tmp_path, s3_server.make_bucket())
    for place in (tmp_path, base, http_server(tmp_path).url):
        assert uris(f"{place}/big.parquet/", storage_options={"s3": s3_server.storage_options}) == ["/0.jpg"]


def test_a_table_in_a_folder_of_images(tmp_path: Path) -> None:
    """Parquet counts wherever it lies; a CSV beside images is one more file."""
    (tmp_path / "a.jpg").write_bytes(b"x")
    write(tmp_path / "b.parquet")
    write(tmp_path / "c.csv")
    write(tmp_path / "d.parquet", [{"n": 1}])
    (tmp_path / "e.parquet").write_bytes(b"no Parquet")
    own = pa.table({"row": [0], "uri": ["/x.jpg"]}).replace_schema_metadata({METADATA_KEY: b"{}"})
    pq.write_table(own, tmp_path / "f.parquet")
    names = [f"{tmp_path}/{name}" for name in ("a.jpg", "c.csv", "d.parquet", "e.parquet", "f.parquet")]
    assert uris(tmp_path) == [names[0], "s3://b/1.jpg", "s3://b/2.jpg", *names[1:]]
    assert uris(tmp_path / "f.parquet") == ["/x.jpg"]
    with pytest.raises(SourceError, match="neither a column `uri` with addresses nor one column with image bytes"):
        read(tmp_path / "d.parquet")
    with pytest.raises(SourceError, match="is not a Parquet file"):
        read(tmp_path / "e.parquet")


def test_include_and_exclude_choose_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", [{"uri": f"/{name}"} for name in ("a.jpg", "b.png", "c.jpg")])
    assert uris(path, include=["*.jpg"], exclude=["*/c*"]) == ["/a.jpg"]
    assert uris(path, include=["*.csv"]) == ["/a.jpg", "/b.png", "/c.jpg"]


def test_the_limit_cuts_tables_too(tmp_path: Path) -> None:
    assert uris(write(tmp_path / "t.csv"), write(tmp_path / "t.parquet"), limit=3) == [
        *("s3://b/1.jpg", "s3://b/2.jpg", "s3://b/1.jpg")
    ]


# --- from stores with faults


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_faults_that_pass_cost_no_rows(tmp_path: Path, name: str, http_server: Callable[..., HttpServer]) -> None:
    rows = [{"uri": f"/{number:06d}-{'x' * 60}.jpg", "n": number} for number in range(20_000)]
    write(tmp_path / name, rows)
    for rule in (
        Rule("status", status=503, first=1),
        Rule("status", status=522, first=1),
        Rule("reset", methods=("GET",), first=2, after_bytes=1000),
        Rule("truncate", methods=("GET",), first=2, after_bytes=70_000),
        Rule("ignore_range"),
        Rule("chunked"),
    ):
        server = http_server(tmp_path, [rule])
        table = read(f"{server.url}/{name}")
        assert table.select(["uri", "n"]).to_pylist() == rows, rule.fault
        assert server.control.faults() > 0, rule.fault


def test_faults_that_stay_are_an_error_and_not_a_shorter_table(
    tmp_path: Path, http_server: Callable[..., HttpServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.sources.reading._BASE_S", 0.001)
    write(tmp_path / "t.csv", [{"uri": f"/{number}.jpg"} for number in range(100)])
    server = http_server(tmp_path, [Rule("truncate", methods=("GET",), after_bytes=500)])
    with pytest.raises(SourceError, match=r"t\.csv: cannot be read"):
        read(f"{server.url}/t.csv")


def test_a_denied_table_says_so(tmp_path: Path, s3_server: S3Server, flaky_proxy: Any) -> None:
    bucket = s3_server.make_bucket()
    for name in ("t.csv", "t.parquet"):
        write(tmp_path / name)
    base = s3_server.upload(tmp_path, bucket)
    proxy = flaky_proxy(s3_server, [Rule("status", status=403, path="*.*")])
    for name in ("t.csv", "t.parquet"):
        with pytest.raises(SourceError, match=rf"{base}/{name}: access is denied"):
            read(f"{base}/{name}", storage_options=proxy.server.storage_options)


# --- the manifest


def test_image_bytes_are_not_read_while_listing(tmp_path: Path, s3_server: S3Server, flaky_proxy: Any) -> None:
    blobs = [bytes([number]) * 100_000 for number in range(60)]
    table = pa.table({"image": pa.array(blobs, pa.binary()), "label": range(60)})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=20, compression="none", use_dictionary=False)
    base = s3_server.upload(tmp_path, s3_server.make_bucket())
    proxy = flaky_proxy(s3_server)
    assert len(uris(f"{base}/t.parquet", storage_options=proxy.server.storage_options)) == 60
    gets = [entry[2] for entry in proxy.control.stats()["log"] if entry[2] is not None]
    spans = [tuple(map(int, text.removeprefix("bytes=").split("-"))) for text in gets]
    assert len(gets) <= 8
    assert sum(stop - start + 1 for start, stop in spans) < 3_000_000


def test_slices_of_the_manifest_read_what_they_touch(tmp_path: Path) -> None:
    """Rows come back by number from several parts and row groups, whatever the spans."""
    out = str(tmp_path / "out")
    table = read(write(tmp_path / "t.jsonl", [{"uri": f"/{number}", "n": number} for number in range(50_000)]))
    first = write_manifest([table.slice(0, 40_000)], out, {})
    parts = first + write_manifest([table.slice(40_000)], out, {}, first_row=40_000)
    rng = np.random.default_rng(0)
    for count in (1, 5, 40, 2000):
        cuts = np.sort(rng.choice(50_000, 2 * count, replace=False)).reshape(-1, 2)
        got = pa.concat_tables(read_rows(out, parts, cuts, {}))
        expected = np.concatenate([np.arange(start, stop) for start, stop in cuts])
        assert np.array_equal(got["row"].to_numpy(), expected)
        assert np.array_equal(got["n"].to_numpy(), expected)
    assert list(read_rows(out, parts, np.empty((0, 2), np.int64), {})) == []

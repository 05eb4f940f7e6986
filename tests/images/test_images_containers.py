"""Images inside tar shards and Parquet tables, fetched by few reads."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.faults import Rule
from support.manifests import decode_all, manifest_of
from support.shards import make_tar, png, shades, tar_manifest

from pipeline.images.plan import RangeRead, plan_reads
from schemas.spec import FetchSpec


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("pipeline.images.retry.BASE_S", 0.005)


def test_members_of_a_tar_are_decoded(tmp_path):
    members = make_tar(tmp_path / "a.tar", [png(n) for n in range(50)])
    table = decode_all(tar_manifest(str(tmp_path / "a.tar"), members))
    assert shades(table) == list(range(50))


def test_any_selection_of_members_in_any_order(tmp_path):
    members = make_tar(tmp_path / "a.tar", [png(n) for n in range(50)])
    manifest = tar_manifest(str(tmp_path / "a.tar"), members)
    indices = [3, 4, 5, 49, 48, 0, 20, 22, 22, 21]
    assert shades(decode_all(manifest.take(indices))) == indices


def test_neighbours_are_fetched_by_one_ranged_read(tmp_path, http_server):
    members = make_tar(tmp_path / "a.tar", [png(n) for n in range(50)])
    server = http_server(tmp_path)
    manifest = tar_manifest(server.url_of("a.tar"), members)
    assert shades(decode_all(manifest)) == list(range(50))
    ((_, _, extent, _),) = server.control.stats()["log"]
    last = members[-1]
    assert extent == f"bytes={members[0].offset}-{last.offset_data + last.size - 1}"


def test_one_read_covers_at_most_eight_mebibytes_and_no_large_gap():
    rows = [(0, 5 << 20), (5 << 20, 2 << 20), (7 << 20, 2 << 20), (10 << 20, 100), (50 << 20, 20 << 20)]
    manifest = manifest_of(
        ["u"] * 5, container=["t"] * 5, offset=[row[0] for row in rows], length=[row[1] for row in rows]
    )
    reads = list(plan_reads(manifest))
    assert [read.rows for read in reads if isinstance(read, RangeRead)] == [2, 1, 1, 1]


def test_a_run_ends_where_the_container_changes():
    manifest = manifest_of(["u"] * 4, container=["s", "s", "t", "t"], offset=[0, 10, 20, 30], length=[10] * 4)
    assert [read.rows for read in plan_reads(manifest)] == [2, 2]


@pytest.mark.parametrize(
    "rule", [Rule("reset", first=2, after_bytes=2000), Rule("truncate", first=2, after_bytes=2000)]
)
def test_a_broken_ranged_read_is_tried_again(tmp_path, http_server, rule):
    members = make_tar(tmp_path / "a.tar", [png(n) for n in range(20)])
    server = http_server(tmp_path, [rule])
    assert shades(decode_all(tar_manifest(server.url_of("a.tar"), members))) == list(range(20))
    assert server.control.requests() == 3


def test_a_server_without_ranges_still_serves_a_small_shard(tmp_path, http_server):
    members = make_tar(tmp_path / "a.tar", [png(n) for n in range(20)])
    server = http_server(tmp_path, [Rule("ignore_range")])
    manifest = tar_manifest(server.url_of("a.tar"), members).take([5, 6, 17])
    assert shades(decode_all(manifest)) == [5, 6, 17]


def test_a_shard_that_became_shorter_fails_the_rows_behind_its_end(tmp_path):
    members = make_tar(tmp_path / "a.tar", [png(n) for n in range(3)])
    manifest = tar_manifest(str(tmp_path / "a.tar"), members)
    with (tmp_path / "a.tar").open("r+b") as file:
        file.truncate(members[2].offset_data + 10)
    table = decode_all(manifest, fetch=FetchSpec(attempts=2))
    assert table["error"].to_pylist() == [None, None, "TruncatedBody"]
    assert shades(decode_all(manifest.slice(0, 2))) == [0, 1]


def test_a_short_shard_of_very_many_small_members(tmp_path):
    members = make_tar(tmp_path / "a.tar", [png(n % 250, (4, 4)) for n in range(1100)])
    with (tmp_path / "a.tar").open("r+b") as file:
        file.truncate(members[-1].offset_data + 10)
    table = decode_all(tar_manifest(str(tmp_path / "a.tar"), members), fetch=FetchSpec(attempts=2))
    assert table["error"].to_pylist() == [None] * 1099 + ["TruncatedBody"]
    assert table["attempts"][-1].as_py() == 3, "two tries of the whole stretch, one of the member alone"


def test_a_missing_shard_fails_each_of_its_rows(tmp_path):
    members = make_tar(tmp_path / "a.tar", [png(n) for n in range(5)])
    manifest = tar_manifest(str(tmp_path / "gone.tar"), members)
    table = decode_all(manifest)
    assert table["error"].to_pylist() == ["NotFound"] * 5
    assert all("gone.tar" in message for message in table["message"].to_pylist())


def test_a_member_above_the_byte_limit(tmp_path):
    members = make_tar(tmp_path / "a.tar", [png(1), png(2) + bytes(5000), png(3)])
    table = decode_all(tar_manifest(str(tmp_path / "a.tar"), members), fetch=FetchSpec(max_bytes=1000))
    assert table["error"].to_pylist() == [None, "TooManyBytes", None]


@pytest.mark.parametrize("name", ["a.tar", "A.TAR", "t.parquet", "a.tar?X-Amz-Signature=0"])
def test_a_broken_shard_above_the_byte_limit_is_not_told_to_raise_it_only(tmp_path, name):
    (row,) = decode_all(manifest_of([tmp_path / name], size=[9 << 30])).to_pylist()
    assert (row["error"], row["retryable"]) == ("TooManyBytes", False)
    assert "a shard or table among the failures is one that cannot be listed to its end" in row["message"]
    assert row["message"].endswith("--update")
    (picture,) = decode_all(manifest_of([tmp_path / "a.png"], size=[9 << 30])).to_pylist()
    assert picture["message"].endswith("(fetch.max_bytes)")


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_shards_in_a_store(tmp_path, request, kind):
    store = request.getfixturevalue({"s3": "s3_server", "gs": "gcs_server"}[kind])
    members = make_tar(tmp_path / "a.tar", [png(n) for n in range(30)])
    url = store.put(store.make_bucket(), "shards/a.tar", (tmp_path / "a.tar").read_bytes())
    table = decode_all(tar_manifest(url, members), storage_options=store.storage_options)
    assert shades(table) == list(range(30))


def table_manifest(url, rows):
    return manifest_of([f"{url}#{row}" for row in rows], container=[str(url)] * len(rows), offset=list(rows))


def struct_column(values, paths):
    return pa.StructArray.from_arrays([pa.array(values, pa.binary()), pa.array(paths, pa.string())], ["bytes", "path"])


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), "struct"])
@pytest.mark.parametrize("group_rows", [1, 7, 1000])
def test_image_bytes_in_a_table(tmp_path, kind, group_rows):
    values = [png(n) for n in range(40)]
    column = struct_column(values, ["x"] * 40) if kind == "struct" else pa.array(values, kind)
    pq.write_table(
        pa.table({"label": list(range(40)), "image": column}), tmp_path / "t.parquet", row_group_size=group_rows
    )
    assert shades(decode_all(table_manifest(tmp_path / "t.parquet", range(40)))) == list(range(40))


def test_any_rows_of_a_table_in_any_order(tmp_path):
    pq.write_table(pa.table({"image": [png(n) for n in range(90)]}), tmp_path / "t.parquet", row_group_size=20)
    rows = [0, 1, 45, 46, 89, 3, 2, 50, 50, 88]
    assert shades(decode_all(table_manifest(tmp_path / "t.parquet", rows))) == rows


def test_the_only_column_with_bytes_is_taken_where_the_named_one_is_absent(tmp_path):
    pq.write_table(pa.table({"photo": [png(n) for n in range(3)], "image": ["a", "b", "c"]}), tmp_path / "t.parquet")
    assert shades(decode_all(table_manifest(tmp_path / "t.parquet", range(3)))) == [0, 1, 2]


def test_null_bytes_too_many_bytes_and_rows_that_do_not_exist(tmp_path):
    pq.write_table(pa.table({"image": [png(7), None, png(9) + bytes(9000), b""]}), tmp_path / "t.parquet")
    table = decode_all(table_manifest(tmp_path / "t.parquet", range(6)), fetch=FetchSpec(max_bytes=5000))
    assert table["error"].to_pylist() == [None, "NoBytes", "TooManyBytes", "NotAnImage", "NotFound", "NotFound"]


def test_a_null_value_with_an_address_is_fetched_from_there(tmp_path, http_server):
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "a.png").write_bytes(png(11))
    server = http_server(tmp_path / "www")
    column = struct_column([png(1), None, None, None], [None, server.url_of("a.png"), server.url_of("b.png"), "c.png"])
    pq.write_table(pa.table({"image": column}), tmp_path / "t.parquet")
    table = decode_all(table_manifest(tmp_path / "t.parquet", range(4)))
    assert shades(table) == [1, 11, None, None]
    assert table["error"].to_pylist() == [None, None, "NotFound", "NoBytes"]
    assert "b.png" in table["message"][2].as_py()


def test_a_file_that_is_no_table_fails_each_of_its_rows(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"not a table at all")
    table = decode_all(table_manifest(tmp_path / "t.parquet", range(20)))
    assert table["stage"].to_pylist() == ["fetch"] * 20
    missing = decode_all(table_manifest(tmp_path / "none.parquet", range(20)))
    assert missing["error"].to_pylist() == ["NotFound"] * 20


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_tables_in_a_failing_store(tmp_path, request, flaky_proxy, kind):
    store = request.getfixturevalue({"s3": "s3_server", "gs": "gcs_server"}[kind])
    pq.write_table(pa.table({"image": [png(n) for n in range(64)]}), tmp_path / "t.parquet", row_group_size=16)
    url = store.put(store.make_bucket(), "t.parquet", (tmp_path / "t.parquet").read_bytes())
    proxy = flaky_proxy(store, [Rule("status", rate=0.2), Rule("reset", rate=0.1)], seed=4)
    table = decode_all(
        table_manifest(url, range(64)), storage_options=proxy.server.storage_options, fetch=FetchSpec(attempts=12)
    )
    assert shades(table) == list(range(64))


def test_a_row_group_is_read_once(tmp_path, http_server):
    pq.write_table(
        pa.table({"image": [png(n) + bytes(20_000) for n in range(64)]}),
        tmp_path / "t.parquet",
        row_group_size=64,
        compression="none",
        use_dictionary=False,
    )
    server = http_server(tmp_path)
    assert shades(decode_all(table_manifest(server.url_of("t.parquet"), range(64)))) == list(range(64))
    fetched = 0
    for method, _, extent, _ in server.control.stats()["log"]:
        if method == "GET" and extent:
            first, last = extent.removeprefix("bytes=").split("-")
            fetched += int(last) - int(first) + 1
    assert fetched < 1.5 * (tmp_path / "t.parquet").stat().st_size


PEAK = """
import sys
sys.path[:0] = sys.argv[2:]
import pyarrow.parquet as pq
from support.manifests import decode_batches, manifest_of
rows = pq.ParquetFile(sys.argv[1]).metadata.num_rows
manifest = manifest_of(["u"] * rows, container=[sys.argv[1]] * rows, offset=list(range(rows)))
done = sum(batch["error"].null_count for batch in decode_batches(manifest))
with open("/proc/self/status") as status:  # not getrusage, whose maximum is handed down by the parent
    peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(done, peak_kib // 1024)
"""


@pytest.mark.slow
def test_a_row_group_of_half_a_gigabyte_is_never_held_whole(tmp_path):
    """120 images of 4 MB in a single row group: the reader streams, and what waits for the decoder is bounded."""
    payload = png(1) + bytes(4_000_000)
    schema = pa.schema([("image", pa.binary())])
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 8}  # pages of 32 MB
    with pq.ParquetWriter(tmp_path / "t.parquet", schema, **options) as writer:
        writer.write_table(pa.table({"image": [payload] * 120}, schema=schema))
    assert pq.ParquetFile(tmp_path / "t.parquet").num_row_groups == 1
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PEAK, str(tmp_path / "t.parquet"), str(root), str(root / "tests")]
    done, peak_mib = map(int, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split())
    assert done == 120
    assert peak_mib < 600

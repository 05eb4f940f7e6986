"""Tables that are read through at length, are damaged, or lie where no part of them can be asked for."""

import errno
import os
import tempfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileOpener
from support.faults import Rule
from support.manifests import decode_all, manifest_of
from support.shards import listed, png, shades

from schemas.spec import FetchSpec


def write(path, rows, nbytes, **options):
    """Pictures of `nbytes` each, row n in grey n % 250."""
    noise = np.random.default_rng(0)
    payloads = [png(n % 250) + noise.bytes(nbytes) for n in range(rows)]
    pq.write_table(pa.table({"image": payloads}), path, **options)
    return payloads


def test_a_table_whose_name_is_not_utf_8(tmp_path):
    with open(os.path.join(os.fsencode(tmp_path), b"t\xe9.parquet"), "wb") as file:
        pq.write_table(pa.table({"image": [png(5)]}), file)
    manifest = manifest_of(["a", "b"], container=[f"{tmp_path}/{name}\\udce9.parquet" for name in "tn"], offset=[0, 0])
    table = decode_all(manifest)
    assert shades(table) == [5, None]
    assert table["error"][1].as_py() == "NotFound"


@pytest.mark.parametrize("cache", ["simplecache", "filecache", "blockcache"])
def test_a_table_behind_a_cache(tmp_path, cache):
    write(tmp_path / "t.parquet", 5, 100)
    options = {cache: {"cache_storage": str(tmp_path / "kept")}}
    manifest = listed(f"{cache}::file://{tmp_path}/t.parquet", options)
    table = decode_all(manifest, storage_options=options)
    assert table["message"].to_pylist() == [None] * 5
    assert shades(table) == list(range(5))
    assert list((tmp_path / "kept").iterdir())


@pytest.fixture
def read_bytes(monkeypatch):
    """The sizes of what is read from local tables."""
    sizes = []
    read = LocalFileOpener.read

    def counted(self, nbytes=-1):
        data = read(self, nbytes)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(LocalFileOpener, "read", counted)
    return sizes


def test_a_row_far_inside_a_row_group_is_no_hang(tmp_path, monkeypatch):
    """On the way to it the store is slow and never silent; all together takes several times the limit."""
    write(tmp_path / "t.parquet", 1200, 8000, write_batch_size=64, data_page_size=1)
    manifest = listed(str(tmp_path / "t.parquet"))
    read = LocalFileOpener.read

    def slow(self, nbytes=-1):
        time.sleep(0.1)
        return read(self, nbytes)

    monkeypatch.setattr(LocalFileOpener, "read", slow)
    monkeypatch.setattr("pipeline.images.readahead._GRACE_S", 0.05)
    table = decode_all(manifest.slice(1190), fetch=FetchSpec(timeout_s=0.3))
    assert shades(table) == list(range(190, 200))


def damage(path, payload):
    """Overwrite 45 payloads of 3,000 bytes from the end of `payload` on; gives the size of the file."""
    data = bytearray(path.read_bytes())
    start = data.index(payload[-100:])
    data[start : start + 45 * 3000] = b"\xff" * (45 * 3000)
    return path.write_bytes(data)


def test_damage_costs_the_rows_behind_it_and_one_more_reading(tmp_path, read_bytes):
    """Pages of 50 rows, the one of rows 150 to 199 damaged: it begins inside a batch, and ends a row group."""
    path = tmp_path / "t.parquet"
    payloads = write(path, 300, 3000, row_group_size=200, write_batch_size=50, data_page_size=1, use_dictionary=False)
    manifest = listed(str(path))
    size = damage(path, payloads[152])
    read_bytes.clear()
    table = decode_all(manifest)
    assert table["error"].to_pylist() == [None] * 150 + ["Corrupt"] * 50 + [None] * 100
    assert shades(table)[:150] + shades(table)[200:] == [*range(150), *range(200, 250), *range(50)]
    assert not any(table["retryable"].to_pylist()[150:200])
    assert "rows 150 to 199: the row group is damaged" in table["message"][150].as_py()
    assert sum(read_bytes) < 4 * size


def test_damage_behind_the_last_wanted_row_of_a_group_costs_nobody(tmp_path):
    path = tmp_path / "t.parquet"
    payloads = write(path, 300, 3000, row_group_size=200, write_batch_size=50, data_page_size=1, use_dictionary=False)
    manifest = listed(str(path)).take([10, 110, 250, 251])
    damage(path, payloads[152])
    table = decode_all(manifest)
    assert table["message"].to_pylist() == [None] * 4
    assert shades(table) == [10, 110, 0, 1]


def test_a_row_group_is_read_up_to_its_last_wanted_row(tmp_path, read_bytes):
    path = tmp_path / "t.parquet"
    write(path, 6000, 3000, row_group_size=3000, write_batch_size=50, data_page_size=1, use_dictionary=False)
    manifest = listed(str(path)).take([10, 3010])
    read_bytes.clear()
    assert shades(decode_all(manifest)) == [10, 10]
    assert sum(read_bytes) < path.stat().st_size / 4


def test_rows_behind_damage_do_not_look_for_it_again(tmp_path, read_bytes):
    path = tmp_path / "t.parquet"
    payloads = write(path, 400, 3000, write_batch_size=50, data_page_size=1, use_dictionary=False)
    manifest = listed(str(path))
    size = damage(path, payloads[52])
    read_bytes.clear()
    assert decode_all(manifest.slice(300))["error"].to_pylist() == ["Corrupt"] * 100
    assert sum(read_bytes) < 2 * size


def test_a_table_on_a_server_without_ranges_is_copied(tmp_path, http_server):
    write(tmp_path / "t.parquet", 40, 200_000)
    server = http_server(tmp_path, [Rule("ignore_range")])
    manifest = listed(server.url_of("t.parquet"))
    server.control.forget()
    assert shades(decode_all(manifest)) == list(range(40))
    whole = [entry for entry in server.control.stats()["log"] if entry[0] == "GET" and not entry[2]]
    assert len(whole) == 1


def test_a_disk_without_room_for_the_copy_is_asked_once(tmp_path, http_server, monkeypatch):
    write(tmp_path / "t.parquet", 40, 200_000)
    server = http_server(tmp_path, [Rule("ignore_range")])
    manifest = listed(server.url_of("t.parquet"))
    asked = []

    def full(**options):
        asked.append(options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    table = decode_all(manifest)
    assert table["error"].to_pylist() == ["StorageError"] * 40
    assert all(table["retryable"].to_pylist())
    assert "TMPDIR" in table["message"][0].as_py()
    assert len(asked) == 1

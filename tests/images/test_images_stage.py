"""From manifest rows to decoded tables: every row once, in order, with its columns."""

import errno
import hashlib
import io
import os
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from support.manifests import decode_all, decode_batches, manifest_of
from support.unprivileged import folder_for_all, without_root

from schemas.spec import FetchSpec
from schemas.tables import decoded_schema


def png(colour, size=(40, 30)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """25 pictures, each of its own grey; number 7 is missing, 11 is no image, 12 is empty."""
    for number in range(25):
        (tmp_path / f"{number:02d}.png").write_bytes(png((number, number, number)))
    (tmp_path / "07.png").unlink()
    (tmp_path / "11.png").write_bytes(b"<!DOCTYPE html><html><body>Please log in</body></html>")
    (tmp_path / "12.png").write_bytes(b"")
    return tmp_path


def uris(folder):
    return [str(folder / f"{number:02d}.png") for number in range(25)]


BROKEN = {7: ("fetch", "NotFound"), 11: ("decode", "NotAnImage"), 12: ("decode", "NotAnImage")}


@pytest.mark.parametrize("batch_rows", [1, 4, 25, 1000])
def test_every_row_comes_once_in_order_with_pixels_or_a_reason(folder, batch_rows):
    batches = list(decode_batches(manifest_of(uris(folder)), batch_rows=batch_rows))
    assert all(0 < batch.num_rows <= batch_rows for batch in batches)
    table = pa.concat_tables(batches)
    table.validate(full=True)
    assert table.schema == decoded_schema([])
    assert table["row"].to_pylist() == list(range(25))
    assert table["uri"].to_pylist() == uris(folder)
    for number, row in enumerate(table.to_pylist()):
        if number in BROKEN:
            assert (row["stage"], row["error"]) == BROKEN[number]
            assert row["pixels"] is None
            assert row["width"] is row["height"] is row["format"] is None
            assert row["message"]
            assert row["attempts"] == 1
            assert row["retryable"] is False
        else:
            assert row["pixels"] == bytes([number] * (32 * 32 * 3))
            assert (row["width"], row["height"], row["format"]) == (40, 30, "PNG")
            assert row["sha256"] == hashlib.sha256((folder / f"{number:02d}.png").read_bytes()).hexdigest()
            assert row["stage"] is row["error"] is row["message"] is row["attempts"] is row["retryable"] is None


def test_what_is_no_image_is_named(folder):
    messages = decode_all(manifest_of(uris(folder)))["message"].to_pylist()
    assert "HTML" in messages[11]
    assert "empty" in messages[12]
    assert "07.png" in messages[7]


def test_the_hash_of_a_file_that_does_not_decode_is_kept(folder):
    row = decode_all(manifest_of(uris(folder))).slice(11, 1)
    assert row["sha256"][0].as_py() == hashlib.sha256((folder / "11.png").read_bytes()).hexdigest()


def test_times_are_measured_for_each_row(folder):
    table = decode_all(manifest_of(uris(folder)))
    assert table["predict_s"].null_count == 25
    assert all(value > 0 for value in table["fetch_s"].to_pylist())
    decode_s = table["decode_s"].to_pylist()
    assert decode_s[7] == 0
    assert all(value > 0 for number, value in enumerate(decode_s) if number != 7)


def test_the_users_columns_ride_along_unchanged(folder):
    user = {
        "caption": pa.array([f"picture {number}" if number % 3 else None for number in range(25)]),
        "box": pa.array([[number, number + 1] for number in range(25)], pa.list_(pa.int16())),
    }
    manifest = manifest_of(uris(folder), user=user)
    table = decode_all(manifest, batch_rows=7)
    assert table.column_names[-2:] == ["caption", "box"]
    assert table.select(["caption", "box"]).equals(manifest.select(["caption", "box"]))


def test_a_sliced_and_chunked_manifest_with_gaps_in_its_rows(folder):
    whole = manifest_of(uris(folder))
    manifest = pa.concat_tables([whole.slice(20, 3), whole.slice(2, 4), whole.slice(9, 2)])
    table = decode_all(manifest, batch_rows=4)
    assert table["row"].to_pylist() == [20, 21, 22, 2, 3, 4, 5, 9, 10]
    assert [pixels[0] for pixels in table["pixels"].to_pylist()] == [20, 21, 22, 2, 3, 4, 5, 9, 10]


def test_an_empty_manifest_gives_no_table():
    assert list(decode_batches(manifest_of([]))) == []


def test_pixels_of_a_batch_lie_end_to_end_in_one_buffer(folder):
    (batch,) = decode_batches(manifest_of(uris(folder)), batch_rows=25)
    (chunk,) = batch["pixels"].chunks
    values = chunk.buffers()[2]
    image_bytes = 32 * 32 * 3
    assert values.size == 22 * image_bytes
    pixels = np.frombuffer(values, np.uint8).reshape(22, 32, 32, 3)
    assert pixels[:, 0, 0, 0].tolist() == [number for number in range(25) if number not in BROKEN]


def test_a_batch_never_outgrows_32_bit_offsets(monkeypatch, folder):
    monkeypatch.setattr("pipeline.images.stage.MAX_PIXEL_BYTES", 5 * 32 * 32 * 3)
    assert [batch.num_rows for batch in decode_batches(manifest_of(uris(folder)), batch_rows=1000)] == [5] * 5


def test_names_with_odd_characters(tmp_path):
    names = ["a b.png", "a#b.png", "a?b=c.png", "a%20b.png", "äß漢.png", "a[1]*.png", "::.png"]
    for name in names:
        (tmp_path / name).write_bytes(png("red"))
    table = decode_all(manifest_of([tmp_path / name for name in names]))
    assert table["error"].to_pylist() == [None] * len(names)


def test_names_that_are_not_utf_8_are_found_as_the_listing_shows_them(tmp_path):
    """And a file that is called so to the letter goes before one that is shown so."""
    folder = os.fsencode(tmp_path)
    for name, shade in ((b"caf\xe9.png", 1), (b"n\xff\xfe\xc3\xa9.png", 2), (b"b\xe9.png", 3), (b"b\\udce9.png", 4)):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(png((shade, 0, 0)))
    (tmp_path / os.fsdecode(b"d\xe9")).mkdir()
    shown = ["caf\\udce9.png", "n\\udcff\\udcfeé.png", "b\\udce9.png", "d\\udce9", "no\\udce9.png"]
    table = decode_all(manifest_of([tmp_path / name for name in shown] + [f"file://{tmp_path}/{shown[0]}"]))
    assert [pixels and pixels[0] for pixels in table["pixels"].to_pylist()] == [1, 2, 4, None, None, 1]
    assert table["error"].to_pylist()[3:5] == ["NotAFile", "NotFound"]


def test_a_file_url_is_a_local_file(folder):
    assert decode_all(manifest_of([f"file://{folder}/03.png"]))["error"].to_pylist() == [None]


def test_a_file_above_the_byte_limit_is_not_read(tmp_path):
    big = tmp_path / "big.png"
    with big.open("wb") as file:
        file.truncate(300 << 20)
    for size in (None, 300 << 20):
        (row,) = decode_all(manifest_of([big], size=[size])).to_pylist()
        assert (row["stage"], row["error"], row["retryable"]) == ("fetch", "TooManyBytes", False)
        assert f"{256 << 20:,}" in row["message"]
        assert row["fetch_s"] < 0.5


def test_pipes_devices_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    table = decode_all(manifest_of([tmp_path / "pipe.png", tmp_path / "folder.png", "/dev/zero", ""]))
    assert table["error"].to_pylist() == ["NotAFile", "NotAFile", "NotAFile", "NoAddress"]


def test_a_file_without_permission_is_forbidden():
    with folder_for_all() as folder:
        for name in ("secret.png", "open.png"):
            (folder / name).write_bytes(png("red"))
        (folder / "secret.png").chmod(0)
        with without_root():
            table = decode_all(manifest_of([folder / "secret.png", folder / "open.png"]))
    assert table["error"].to_pylist() == ["Forbidden", None]


def test_an_address_of_an_unknown_scheme_is_a_failure_row():
    (row,) = decode_all(manifest_of(["nosuch://bucket/a.png"])).to_pylist()
    assert row["stage"] == "fetch"
    assert "nosuch" in row["message"]


def test_any_fsspec_scheme_is_read():
    import fsspec

    fsspec.filesystem("memory").pipe_file("/images/a.png", png("blue"))
    table = decode_all(manifest_of(["memory://images/a.png", "memory://images/none.png"]))
    assert table["error"].to_pylist() == [None, "NotFound"]


def test_members_of_a_zip_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for number in range(20):
            archive.writestr(f"folder/{number}.png", png((number, 0, 0)))
    uris = [f"zip://folder/{number}.png::{tmp_path}/x.zip" for number in range(21)]
    table = decode_all(manifest_of(uris))
    assert table["error"].to_pylist() == [None] * 20 + ["NotFound"]
    assert [pixels[0] for pixels in table["pixels"].to_pylist()[:20]] == list(range(20))


@pytest.fixture
def opened(monkeypatch):
    """The zip archives that were opened, in order."""
    from fsspec.implementations.zip import ZipFileSystem

    names = []
    original = ZipFileSystem.__init__

    def counted(self, fo, **options):
        names.append(fo)
        original(self, fo, **options)

    monkeypatch.setattr(ZipFileSystem, "__init__", counted)
    return names


def zip_members(archive, shades):
    with zipfile.ZipFile(archive, "w") as file:
        for shade in shades:
            file.writestr(f"{shade}.png", png((shade, 0, 0)))
    return [f"zip://{shade}.png::{archive}" for shade in shades]


def open_archives():
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}").endswith(".zip")]


def test_an_archive_is_not_opened_for_each_member(tmp_path, opened):
    uris = zip_members(tmp_path / "x.zip", range(200))
    uris[50] = uris[50].replace("50.png", "none.png")
    table = decode_all(manifest_of(uris), fetch=FetchSpec(concurrency=4))
    assert [pixels and pixels[0] for pixels in table["pixels"].to_pylist()] == [*range(50), None, *range(51, 200)]
    assert table["error"][50].as_py() == "NotFound"
    assert len(opened) <= 4
    assert not open_archives()


def test_archives_that_stay_open_are_few(tmp_path):
    pairs = [zip_members(tmp_path / f"{n}.zip", [n, 100 + n]) for n in range(30)]
    batches = decode_batches(manifest_of([uri for pair in pairs for uri in pair]), fetch=FetchSpec(concurrency=2))
    shades = []
    for batch in batches:
        assert len(open_archives()) <= 4, "two that are idle, two that are read"
        shades += [pixels[0] for pixels in batch["pixels"].to_pylist()]
    assert shades == [shade for n in range(30) for shade in (n, 100 + n)]


def test_an_archive_that_fails_is_opened_anew(tmp_path, opened, monkeypatch):
    uris = zip_members(tmp_path / "x.zip", range(10))
    read, errors = zipfile.ZipExtFile.read, [OSError(errno.EIO, "Input/output error")]

    def failing(self, *sizes):
        if self.name == "5.png" and errors:
            raise errors.pop()
        return read(self, *sizes)

    monkeypatch.setattr(zipfile.ZipExtFile, "read", failing)
    table = decode_all(manifest_of(uris), fetch=FetchSpec(concurrency=1))
    assert [pixels[0] for pixels in table["pixels"].to_pylist()] == list(range(10))
    assert len(opened) == 2


def test_closing_early_leaves_no_thread_behind(folder):
    import threading

    before = {thread.ident for thread in threading.enumerate()}
    batches = decode_batches(manifest_of(uris(folder) * 40), batch_rows=2, fetch=FetchSpec(concurrency=8))
    next(batches)
    batches.close()
    for thread in threading.enumerate():
        if thread.ident not in before and thread.name.startswith("fetch"):
            thread.join(5)
            assert not thread.is_alive()

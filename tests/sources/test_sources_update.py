"""`--update`: which of the rows listed now are new or changed."""

import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.sources.columns import content_table
from pipeline.sources.manifest import ManifestPart, read_sources, write_manifest
from pipeline.sources.update import new_and_changed, replaced_rows, unsigned
from schemas.errors import OutputError
from schemas.spec import JobSpec, build_spec

Item = tuple[str, str | None, int | None]


def listed(*items: Item, **user: list[Any]) -> pa.Table:
    uris, etags, sizes = ([item[place] for item in items] for place in range(3))
    return content_table([str(uri) for uri in uris], {"etag": etags, "size": sizes}, pa.table(user))


class Frozen:
    """A manifest that is updated again and again, as a run does it."""

    def __init__(self, out: Path, *tables: pa.Table) -> None:
        self.out = str(out)
        self.parts = write_manifest(tables, self.out, {})
        self.added: list[ManifestPart] = []

    def update(self, *tables: pa.Table, pending: tuple[int, ...] = ()) -> list[tuple[str, int | None]]:
        """(address, row that it replaces) of what the update took up; all rows but `pending` have their image."""
        fresh = new_and_changed(tables, self.out, self.parts, lambda rows: ~np.isin(rows, pending), {})
        added = write_manifest(fresh, self.out, {}, first_row=self.parts[-1].stop)
        self.parts += added
        self.added += added
        files = [pq.read_table(f"{self.out}/manifest/{part.name}") for part in added]
        return [(row["uri"], row["replaces"]) for file in files for row in file.to_pylist()]

    @property
    def replaced(self) -> list[int]:
        return sorted(replaced_rows(self.out, self.added, {}).tolist())


A, B, C = ("s3://b/a", "1", 10), ("s3://b/b", "2", 20), ("s3://b/c", "3", 30)


def test_new_and_changed_objects_alone_are_taken_up(tmp_path: Path) -> None:
    frozen = Frozen(tmp_path, listed(A, B, C))
    assert frozen.update(listed(A, B, C)) == []
    assert frozen.update(listed(("s3://b/0", "0", 1), A, ("s3://b/b", "9", 20), ("s3://b/c", "3", 31))) == [
        *(("s3://b/0", None), ("s3://b/b", 1), ("s3://b/c", 2))
    ]
    assert frozen.replaced == [1, 2]


def test_an_object_may_change_again_and_go_and_come_back(tmp_path: Path) -> None:
    frozen = Frozen(tmp_path, listed(A, B))
    assert frozen.update(listed(("s3://b/a", "x", 10), B)) == [("s3://b/a", 0)]
    assert frozen.update(listed(B)) == []
    assert frozen.update(listed(("s3://b/a", "x", 10), B)) == []
    assert frozen.update(listed(A, B)) == [("s3://b/a", 2)]
    assert frozen.replaced == [0, 2]


def test_objects_without_etag_and_size_count_as_unchanged(tmp_path: Path) -> None:
    plain = ("https://h/a.jpg", None, None)
    frozen = Frozen(tmp_path, listed(plain, A))
    assert frozen.update(listed(plain, ("s3://b/a", None, None))) == []
    assert frozen.update(listed(("https://h/a.jpg", "now", None))) == [("https://h/a.jpg", 0)]


def test_an_address_that_is_listed_twice_is_two_objects(tmp_path: Path) -> None:
    frozen = Frozen(tmp_path, listed(A, A, B))
    assert frozen.update(listed(A, B, A)) == []
    changed = ("s3://b/a", "9", 10)
    assert frozen.update(listed(changed), listed(B, changed)) == [("s3://b/a", 0), ("s3://b/a", 1)]
    assert frozen.replaced == [0, 1]
    assert frozen.update(listed(changed, changed, changed, B, B)) == [("s3://b/a", None), ("s3://b/b", None)]
    assert frozen.update(listed(changed, B)) == []


def test_copies_of_an_address_keep_their_order_when_one_has_changed(tmp_path: Path) -> None:
    """A folder, and a table beside it that names a file of the folder and says more of it."""
    named = ("s3://b/a", None, None)
    frozen = Frozen(tmp_path, listed(A, named, B))
    for number, replaced in (("x", 0), ("y", 3), ("z", 4)):
        again = listed(("s3://b/a", number, 10), named, B)
        assert frozen.update(again) == [("s3://b/a", replaced)]
        assert frozen.update(again) == []
    assert frozen.replaced == [0, 3, 4]


def test_a_url_that_was_signed_anew_is_the_same_object(tmp_path: Path) -> None:
    old = ("https://h/a.jpg?X-Amz-Signature=old&v=1", None, None)
    frozen = Frozen(tmp_path, listed(old))
    assert frozen.update(listed(("https://h/a.jpg?X-Amz-Signature=new&v=1", None, None))) == []
    other = "https://h/a.jpg?X-Amz-Signature=new&v=2"
    assert frozen.update(listed((other, None, None))) == [(other, None)]


def test_rows_without_an_image_take_their_new_signature(tmp_path: Path) -> None:
    """Signatures last for hours or days: what is left of a run could otherwise never be fetched."""
    signed = "https://h/{}.jpg?X-Amz-Signature={}"
    frozen = Frozen(tmp_path, listed(*((signed.format(n, "old"), None, None) for n in "abc"), A))
    again = listed(*((signed.format(n, "new"), None, None) for n in "abc"), A)
    assert frozen.update(again, pending=(1, 2, 3)) == [(signed.format("b", "new"), 1), (signed.format("c", "new"), 2)]
    assert frozen.update(again, pending=(3, 4, 5)) == []


def test_what_looks_secret_may_be_what_tells_one_object_from_another(tmp_path: Path) -> None:
    first = ("https://h/i?key=b.jpg&token=1", None, None)
    other = ("https://h/i?key=a.jpg&token=1", None, None)
    frozen = Frozen(tmp_path, listed(first))
    assert frozen.update(listed(other)) == [(other[0], None)]
    assert frozen.update(listed(other, first)) == []


@pytest.mark.parametrize(
    ("signed", "plain"),
    [
        ("s3://user:word@b/a.jpg", "s3://b/a.jpg"),
        ("https://h/a?X-Amz-Date=1&v=1&X-Amz-Signature=2#m.jpg", "https://h/a?v=1#m.jpg"),
        ("https://h/a?X-Goog-Expires=1&X-Goog-Signature=2", "https://h/a"),
        ("https://h/a?AWSAccessKeyId=1&Expires=2&Signature=3", "https://h/a"),
        ("https://h/a?sv=1&se=2&sp=r&sig=3&side=left", "https://h/a?side=left"),
        ("https://h/a?se=2&expires=3", "https://h/a?se=2&expires=3"),
        ("https://h/a?token=1&b", "https://h/a?token=1&b"),
        ("/photos/a?sig=1", "/photos/a?sig=1"),
        ("wasbs://c@account/a?sig=1&b", "wasbs://c@account/a?b"),
    ],
)
def test_what_is_left_of_a_signed_address(signed: str, plain: str) -> None:
    assert unsigned(signed) == plain


def test_the_users_columns_stay_with_their_rows(tmp_path: Path) -> None:
    frozen = Frozen(tmp_path, listed(A, B, label=["x", "y"]))
    frozen.update(listed(C, A, ("s3://b/b", "9", 20), label=["z", "x", "w"]))
    table = pq.read_table(f"{tmp_path}/manifest/{frozen.added[0].name}")
    assert table.select(["uri", "label"]).to_pylist() == [
        {"uri": "s3://b/c", "label": "z"},
        {"uri": "s3://b/b", "label": "w"},
    ]


def spec_of(*sources: Path, **values: Any) -> JobSpec:
    return build_spec({"sources": [str(source) for source in sources], "model": "m", "out": "/nowhere", **values})


def touch(path: Path, data: bytes, time_ns: int) -> None:
    path.write_bytes(data)
    os.utime(path, ns=(time_ns, time_ns))


def test_files_by_time_and_size(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in "abc":
        touch(source / name, b"123", 10**9)
    frozen = Frozen(tmp_path / "out", *read_sources(spec_of(source)))
    touch(source / "a", b"1234", 10**9)
    touch(source / "b", b"321", 2 * 10**9)
    touch(source / "d", b"1", 10**9)
    assert frozen.update(*read_sources(spec_of(source))) == [
        *((f"{source}/a", 0), (f"{source}/b", 1), (f"{source}/d", None))
    ]


def test_tables_and_shards(tmp_path: Path) -> None:
    """New lines of a table are new; a shard or table of bytes that changed has changed with all that is in it."""

    def shard(path: Path, *names: str) -> None:
        with tarfile.open(path, "w") as tar:
            for name in names:
                tar.addfile(tarfile.TarInfo(name))

    (tmp_path / "in").mkdir()
    csv, tars = tmp_path / "in/t.csv", [tmp_path / "in/1.tar", tmp_path / "in/2.tar"]
    bytes_table = tmp_path / "in/x.parquet"
    csv.write_text("uri,n\n/a.jpg,1\n/b.jpg,2\n")
    for tar in tars:
        shard(tar, "a.jpg", "b.jpg")
    pq.write_table(pa.table({"image": [b"1", b"2"]}), bytes_table)
    spec = spec_of(csv, *tars, bytes_table)
    frozen = Frozen(tmp_path / "out", *read_sources(spec))
    assert frozen.update(*read_sources(spec)) == []
    csv.write_text("uri,n\n/c.jpg,3\n/a.jpg,1\n/b.jpg,2\n")
    shard(tars[1], "b.jpg", "c.jpg", "a.jpg")
    os.utime(tars[1], ns=(1, 1))
    pq.write_table(pa.table({"image": [b"1", b"2", b"3"]}), bytes_table)
    os.utime(bytes_table, ns=(1, 1))
    assert frozen.update(*read_sources(spec)) == [
        *(("/c.jpg", None), (f"{tars[1]}#b.jpg", 5), (f"{tars[1]}#c.jpg", None), (f"{tars[1]}#a.jpg", 4)),
        *((f"{bytes_table}#0", 6), (f"{bytes_table}#1", 7), (f"{bytes_table}#2", None)),
    ]


@pytest.mark.parametrize("most", [0, 8192, 400_000])
def test_a_temporary_folder_without_room_is_told(tmp_path: Path, most: int) -> None:
    """As on a full disk: here it is the size of files that is limited."""
    count = 60_000
    table = content_table([f"s3://b/{number:07d}" for number in range(count)], {"size": range(count)})
    frozen = Frozen(tmp_path, table)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        with pytest.raises(OutputError, match="make room there, or name another folder with TMPDIR"):
            list(new_and_changed([table], frozen.out, frozen.parts, lambda rows: rows < 0, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_many_rows_over_many_batches(tmp_path: Path) -> None:
    count = 60_000
    uris = [f"s3://b/{number:07d}.jpg" for number in range(count)]
    etags = [str(number) for number in range(count)]
    table = content_table(uris, {"etag": etags, "size": range(count)})
    frozen = Frozen(tmp_path, table)
    rng = np.random.default_rng(1)
    changed = np.sort(rng.choice(count, 100, replace=False))
    for number in changed:
        etags[number] = "new"
    again = content_table(uris, {"etag": etags, "size": range(count)})
    shuffled = again.take(pa.array(rng.permutation(count)))
    found = frozen.update(*(shuffled.slice(start, 7000) for start in range(0, count, 7000)))
    assert sorted(replaced for _, replaced in found if replaced is not None) == changed.tolist()
    assert frozen.replaced == changed.tolist()


COMPARING = """
import sys
from pipeline.signals import interruptible
from pipeline.sources import update
from schemas.errors import Interrupted
endless = "select sum(range) as place, 0 as replaces from range(1_000_000_000_000)"
update._COMPARE = f"copy (select 1) to '{sys.argv[1]}/begun.csv'; {endless}"
try:
    with interruptible():
        list(update.new_and_changed([], sys.argv[1], [], lambda rows: rows, {}))
except (KeyboardInterrupt, Interrupted) as stopped:
    print(type(stopped).__name__, getattr(stopped, "exit_code", None))
"""


@pytest.mark.parametrize(
    ("number", "told"), [(signal.SIGINT, "KeyboardInterrupt None"), (signal.SIGTERM, "Interrupted 143")]
)
def test_told_to_stop_while_the_listings_are_compared(tmp_path: Path, number: int, told: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", COMPARING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "begun.csv").exists():
            assert child.poll() is None, "ended before it compared"
            assert time.monotonic() < deadline, "the comparison did not begin"
            time.sleep(0.02)
        child.send_signal(number)
        assert child.communicate(timeout=60)[0].strip() == told
    finally:
        child.kill()
        child.wait()

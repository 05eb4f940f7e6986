"""How many times one archive is opened at once, and what happens where that hangs."""

import contextlib
import threading
import time
import zipfile

import pytest
from fsspec.implementations.zip import ZipFileSystem
from support.manifests import decode_all, manifest_of
from support.shards import png, shades

from pipeline.images.archives import Archives
from schemas.spec import FetchSpec


def members(path, count):
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(count):
            archive.writestr(f"{number}.png", png(number))
    return manifest_of([f"zip://{number}.png::{path}" for number in range(count)])


def test_many_threads_open_an_archive_few_times(tmp_path, monkeypatch):
    manifest = members(tmp_path / "x.zip", 60)
    opened, alive, most = ZipFileSystem.__init__, set(), []
    closed, read = ZipFileSystem.close, zipfile.ZipExtFile.read

    def counted(self, *given, **options):
        opened(self, *given, **options)
        alive.add(id(self))
        most.append(len(alive))

    def slow(self, *sizes):
        time.sleep(0.01)
        return read(self, *sizes)

    monkeypatch.setattr(ZipFileSystem, "__init__", counted)
    monkeypatch.setattr(ZipFileSystem, "close", lambda self: (alive.discard(id(self)), closed(self)))
    monkeypatch.setattr(zipfile.ZipExtFile, "read", slow)
    assert shades(decode_all(manifest, fetch=FetchSpec(concurrency=16))) == list(range(60))
    assert 1 < max(most) <= 4
    assert not alive


class Archive:
    """No file system at all, which is enough to be lent."""

    cachable = False

    def close(self):
        pass


@pytest.fixture
def hung():
    """An event that ends what a test makes hang."""
    event = threading.Event()
    yield event
    event.set()


def test_an_opening_that_hangs_keeps_nobody_else_waiting_for_long(hung):
    archives, begun = Archives(4), threading.Event()

    def opened():
        begun.set()
        hung.wait()
        return Archive()

    def read():
        with archives.lent("x", opened, timeout_s=60.0):
            pass

    reading = threading.Thread(target=read)
    reading.start()
    begun.wait()
    with archives.lent("y", Archive, timeout_s=60.0), archives.lent("x", Archive, timeout_s=0.2):
        pass
    hung.set()
    reading.join()


def test_reads_that_hang_leave_the_archive_to_others():
    archives = Archives(4)
    with contextlib.ExitStack() as hanging:
        used = [hanging.enter_context(archives.lent("x", Archive, timeout_s=60.0)) for _ in range(4)]
        for _ in range(2):
            with archives.lent("x", Archive, timeout_s=0.2) as archive:
                used.append(archive)
    assert len(set(used)) == 5


def test_turns_come_in_order():
    archives, order, threads = Archives(4), [], []

    def read(number):
        with archives.lent("x", Archive, timeout_s=60.0):
            order.append(number)

    with contextlib.ExitStack() as kept:
        for _ in range(3):
            kept.enter_context(archives.lent("x", Archive, timeout_s=60.0))
        with archives.lent("x", Archive, timeout_s=60.0):
            for number in range(20):
                threads.append(threading.Thread(target=read, args=(number,)))
                threads[-1].start()
                while len(archives._waiting) <= number:
                    time.sleep(0.001)
        for thread in threads:
            thread.join()
    assert order == list(range(20))

"""Reads ahead of their consumer: in order, overlapped, bounded in threads and bytes, and never stuck."""

import gc
import threading
import time
import tracemalloc

import pytest
from support.manifests import decode_batches, manifest_of

from pipeline.images.fetch import _Fetcher
from pipeline.images.plan import ObjectRead
from pipeline.images.readahead import ReadAhead, Room
from pipeline.images.retry import Attempts
from schemas.errors import ImageError
from schemas.spec import FetchSpec


def ahead(run, *, room=None, threads=4, window=64, limit_s=30.0, hung=None):
    return ReadAhead(
        run, hung or (lambda item: None), room=room or Room(1 << 30), threads=threads, window=window, limit_s=limit_s
    )


def test_results_come_in_the_order_of_the_items():
    def run(item, ticket):
        time.sleep(0.02 if item % 7 == 0 else 0)
        return item

    assert list(ahead(run).results(range(200))) == list(range(200))


def test_no_more_than_the_window_is_begun():
    begun = []
    results = ahead(lambda item, ticket: begun.append(item), window=5).results(range(100))
    next(results)
    time.sleep(0.1)
    assert len(begun) <= 5


def test_an_exception_in_a_read_is_raised_where_it_is_consumed():
    def run(item, ticket):
        if item == 3:
            raise KeyError("three")
        return item

    results = ahead(run).results(range(10))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="three"):
        next(results)


def test_bytes_held_never_exceed_the_room_by_more_than_one_file():
    room = Room(1000)
    lock = threading.Lock()
    held = {"now": 0, "most": 0}

    def run(item, ticket):
        room.take(ticket, 300)
        with lock:
            held["now"] += 300
            held["most"] = max(held["most"], held["now"])
        return item

    for _ in ahead(run, room=room, threads=16).results(range(60)):
        time.sleep(0.002)
        with lock:
            held["now"] -= 300
    assert 900 <= held["most"] <= 1300


def test_a_file_larger_than_the_room_is_let_through_when_its_turn_comes():
    room = Room(1000)

    def run(item, ticket):
        room.take(ticket, 5000 if item % 3 == 0 else 100)
        return item

    assert list(ahead(run, room=room, threads=3).results(range(30))) == list(range(30))


def test_a_read_that_finds_no_room_waits_and_reads_again():
    """The size is known only once the answer is there; the first answer is dropped, and no attempt is counted."""
    room = Room(1000)
    reads = []

    def run(item, ticket):
        attempts = Attempts("u", FetchSpec(), room, ticket)
        attempts.wait_for_room(10)

        def read(left_s):
            reads.append(item)
            attempts.need(900)
            return item

        return attempts.run(read), attempts.count

    results = list(ahead(run, room=room, threads=4).results(range(12)))
    assert results == [(item, 1) for item in range(12)]
    assert len(reads) > 12


def test_a_read_that_hangs_in_its_driver_is_given_up(monkeypatch):
    monkeypatch.setattr("pipeline.images.readahead._GRACE_S", 0.2)
    release = threading.Event()

    def run(item, ticket):
        if item in (2, 3):
            release.wait(60)
        return item

    started = time.monotonic()
    results = ahead(run, threads=2, limit_s=0.3, hung=lambda item: f"hung {item}").results(range(8))
    assert list(results) == [0, 1, "hung 2", "hung 3", 4, 5, 6, 7]
    assert time.monotonic() - started < 10
    release.set()


def test_waiting_for_room_is_not_hanging(monkeypatch):
    monkeypatch.setattr("pipeline.images.readahead._GRACE_S", 0.1)
    room = Room(100)

    def run(item, ticket):
        room.take(ticket, 90)
        return item

    seen = []
    for item in ahead(run, room=room, threads=4, limit_s=0.1, hung=lambda item: "hung").results(range(6)):
        time.sleep(0.4)
        seen.append(item)
    assert seen == list(range(6))


def test_waits_grow_and_stay_below_the_cap(monkeypatch):
    waits = []
    monkeypatch.setattr("pipeline.images.retry.time.sleep", waits.append)
    monkeypatch.setattr("pipeline.images.retry.random.uniform", lambda low, high: high)
    attempts = Attempts("u", FetchSpec(attempts=10, timeout_s=1000), Room(10), 0)

    def read(left_s):
        raise ConnectionResetError("reset by peer")

    with pytest.raises(ImageError, match="reset by peer") as caught:
        attempts.run(read)
    assert waits == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0])
    assert (caught.value.error, caught.value.attempts, caught.value.retryable) == ("ConnectionFailed", 10, True)


def test_a_failure_keeps_nothing_of_the_file_alive(tmp_path):
    """48 broken files of 4 MB each, and the garbage collector off: at most a few of them are held at any time."""
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(4_000_000))
    gc.disable()
    tracemalloc.start()
    try:
        batches = decode_batches(manifest_of([path] * 48), batch_rows=48, fetch=FetchSpec(concurrency=1))
        (batch,) = batches
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert batch["error"].null_count == 0
    assert held < 8_000_000


def test_waiting_for_others_is_not_fetching(tmp_path):
    """Decoding holds the bytes of earlier images: that this one's must wait is no fault of the store."""
    path = tmp_path / "a.jpg"
    path.write_bytes(b"x" * 8)
    room = Room(8)
    room.take(0, 8)
    fetched = []
    fetcher = _Fetcher(FetchSpec(), "image", {}, room)
    started = time.monotonic()
    reading = threading.Thread(target=lambda: fetched.extend(fetcher.run(ObjectRead(str(path), 8), 1)))
    reading.start()
    time.sleep(0.6)
    assert not fetched
    room.release(0)
    reading.join(30)
    (result,) = fetched
    assert result.result == b"x" * 8
    assert result.seconds < time.monotonic() - started - 0.3

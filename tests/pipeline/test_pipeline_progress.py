"""What a running job says about itself, at times that are given."""

from typing import Any

import pytest

from pipeline import progress
from pipeline.placement import place
from pipeline.progress import Meter
from schemas.attempt import AttemptRecord, StageSeconds
from schemas.machines import Machines
from schemas.values import ActorRange

MACHINE = Machines(cpus=2.0, gpus=0.0, object_store_bytes=1e9, nodes=1, node_cpus=(2.0,))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    now = {"s": 100.0}

    class Time:
        @staticmethod
        def monotonic() -> float:
            return now["s"]

    monkeypatch.setattr(progress, "time", Time)
    return now


def meter(total: int = 100, done: int = 0) -> Meter:
    placement = place(
        MACHINE, rows=total, actors=None, gpus_per_actor=0.0, batch_size=8, pixel_bytes=150_528, model_bytes=1 << 20
    )
    return Meter(total, done, 0, placement, readers=16)


def recorded(which: Meter) -> dict[str, Any]:
    attempt = AttemptRecord(attempt=1, shard_index=0, shard_count=1, started="", host="", pid=1)
    which.report(attempt)
    return attempt.model_dump()


def test_rates_count_from_the_first_rows_of_all_actors_to_the_last_ones(clock: dict[str, float]) -> None:
    ours = meter()
    for at, rows in ((110.0, 10), (110.003, 10), (115.003, 45), (120.003, 35)):
        clock["s"] = at
        ours.received(rows)
    clock["s"] = 126.0  # what is still held is written
    ours.committed(100, 0, 1, StageSeconds())
    found = recorded(ours)
    assert (found["startup_s"], found["wall_s"]) == (10.0, 26.0)
    assert found["images_per_s"] == pytest.approx(8.0)


def test_blocks_that_arrive_together_are_no_rate(clock: dict[str, float]) -> None:
    ours = meter(total=16)
    for at in (110.0, 110.003):
        clock["s"] = at
        ours.received(8)
    clock["s"] = 116.0
    assert recorded(ours)["images_per_s"] == 1.0


def test_small_blocks_that_follow_at_once_are_no_rate(clock: dict[str, float]) -> None:
    ours = meter(total=5)
    for at, rows in ((110.0, 2), (110.001, 2), (110.0012, 1)):
        clock["s"] = at
        ours.received(rows)
    assert recorded(ours)["images_per_s"] == pytest.approx(0.5, rel=0.01)


def test_a_job_that_stalls_slows_down_while_one_looks_at_it(clock: dict[str, float]) -> None:
    ours = meter()
    for at, rows in ((110.0, 5), (110.0, 5), (110.5, 1), (115.0, 49)):
        assert ours.look().left_s is None, "start-up would be in it"
        clock["s"] = at
        ours.received(rows)
    assert ours.look().rate_mean == 10.0
    clock["s"] = 135.0
    assert ours.look().rate_mean == 2.0
    assert ours.look().left_s == 20.0


def test_one_block_is_counted_over_the_whole_time(clock: dict[str, float]) -> None:
    ours = meter(total=30, done=20)
    clock["s"] = 105.0
    ours.received(10)
    assert recorded(ours)["images_per_s"] == 2.0


def test_nothing_came(clock: dict[str, float]) -> None:
    ours = meter()
    clock["s"] = 105.0
    found = recorded(ours)
    assert (found["startup_s"], found["images_per_s"], ours.look().left_s) == (None, 0.0, None)


def test_the_bottleneck_counts_all_the_actors_that_there_may_be(clock: dict[str, float]) -> None:
    box = Machines(cpus=8.0, gpus=4.0, object_store_bytes=1e10, nodes=1, node_cpus=(8.0,))
    placement = place(box, rows=100, actors=None, gpus_per_actor=1.0, batch_size=8, pixel_bytes=1, model_bytes=1)
    ours = Meter(100, 0, 0, placement, readers=16)
    ours.received(8)
    clock["s"] += 10.0
    ours.committed(100, 0, 1, StageSeconds(decode=70.0, predict=12.0))  # seven of eight cores; each GPU a third
    assert ours.bottleneck() == "decode"
    ours.committed(0, 0, 0, StageSeconds(predict=27.0))  # each GPU all the time
    assert ours.bottleneck() == "predict"
    ours.committed(0, 0, 0, StageSeconds(fetch=1000.0))  # eight of the sixteen reads of each decoder all the time
    assert ours.bottleneck() == "predict"
    ours.committed(0, 0, 0, StageSeconds(fetch=270.0))
    assert ours.bottleneck() == "fetch"


def test_the_bottleneck_of_a_served_model_is_what_waits_for_the_server(clock: dict[str, float]) -> None:
    """Its actors take no cores from those that decode."""
    box = Machines(cpus=16.0, gpus=0.0, object_store_bytes=1e10, nodes=1, node_cpus=(16.0,))
    four = ActorRange(min=4, max=4)
    placement = place(box, rows=100, actors=four, gpus_per_actor=0.0, batch_size=8, pixel_bytes=1, model_bytes=1,
        one_call=True, served_batch=8, in_flight=4)  # fmt: skip
    ours = Meter(100, 0, 0, placement, readers=16, served=True)
    ours.received(8)
    clock["s"] += 10.0
    ours.committed(100, 0, 1, StageSeconds(decode=48.0, predict=40.0))  # a third of the cores; each actor all the time
    assert ours.bottleneck() == "predict"
    ours.committed(0, 0, 0, StageSeconds(decode=112.0))  # each core all the time
    ours.committed(0, 0, 0, StageSeconds(decode=1.0))
    assert ours.bottleneck() == "decode"


def test_the_bottleneck_of_a_cluster_that_grows_counts_what_it_had(clock: dict[str, float]) -> None:
    """It begins with two cores and one GPU, and has as many for half of the time as it has in the end."""
    begun = Machines(cpus=2.0, gpus=1.0, object_store_bytes=1e10, node_cpus=(2.0,), may_grow=True)
    actors = ActorRange(min=1, max=4)
    placement = place(begun, rows=100, actors=actors, gpus_per_actor=1.0, batch_size=8, pixel_bytes=1, model_bytes=1)
    counts = iter([(2.0, 1.0), (14.0, 1.0), (14.0, 4.0)])
    ours = Meter(100, 0, 0, placement, 16, lambda: next(counts))
    ours.look()  # while nothing has come yet nobody works
    ours.received(8)
    ours.look()
    clock["s"] += 4.0
    ours.look()
    clock["s"] += 1.0
    ours.committed(100, 0, 1, StageSeconds(decode=16.0, predict=4.0))  # 40% of eight cores, 80% of the GPU
    assert ours.look().bottleneck == "predict"
    ours.committed(0, 0, 0, StageSeconds(decode=21.0))  # in all 37% of ten cores, 20% of two GPUs
    clock["s"] += 5.0
    assert ours.look().bottleneck == "decode"


def test_the_bottleneck_counts_no_actors_on_what_is_left_of_two_gpus(clock: dict[str, float]) -> None:
    box = Machines(cpus=8.0, gpus=8.0, object_store_bytes=1e10, node_cpus=(8.0,), may_grow=True)
    actors = ActorRange(min=1, max=16)
    placement = place(box, rows=100, actors=actors, gpus_per_actor=0.6, batch_size=8, pixel_bytes=1, model_bytes=1)
    ours = Meter(100, 0, 0, placement, 16, lambda: (8.0, 8.0))
    ours.received(8)
    ours.look()
    clock["s"] += 10.0
    ours.committed(100, 0, 1, StageSeconds(decode=56.0, predict=64.0))  # 70% of the cores, 80% of eight actors
    assert ours.bottleneck() == "predict"


def test_cores_that_wait_for_bytes_are_held_up_by_fetching(clock: dict[str, float]) -> None:
    ours = meter()
    ours.received(8)
    clock["s"] += 10.0
    ours.committed(100, 0, 1, StageSeconds(fetch=150.0, decode=3.0, predict=12.0))  # of 320 seconds of 32 reads
    assert ours.bottleneck() == "predict"
    ours.committed(0, 0, 0, StageSeconds(fetch=120.0))
    assert ours.bottleneck() == "fetch"


def test_silence_is_told(clock: dict[str, float]) -> None:
    ours = meter()
    ours.received(8)
    clock["s"] += 290
    assert ours.look().note == ""
    clock["s"] += 430
    assert ours.look().note == "nothing has come for 12 minutes"
    ours.received(8)
    assert ours.look().note == ""

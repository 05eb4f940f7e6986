"""Room between the stages: Ray Data's own bookkeeping, fed with our placement, must let every decoding core work."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from pipeline.flow import run
from pipeline.placement import Placement, place
from schemas.errors import ClusterError, Interrupted
from schemas.machines import Machines
from schemas.spec import build_spec

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

GIB = 1 << 30
PIXELS_224 = 224 * 224 * 3
PIXELS_384 = 384 * 384 * 3
MODEL_BYTES = 8 * 86_000_000


def cluster(cpus: int, gpus: int, *, nodes: int = 1, memory_gib: int = 0, may_grow: bool = False) -> Machines:
    """Nodes of `cpus` cores and `gpus` GPUs each; the object store has 30% of 4 GiB a core unless it is said."""
    memory = (memory_gib or 4 * cpus) * GIB
    return Machines(
        cpus=cpus * nodes, gpus=gpus * nodes, object_store_bytes=0.3 * memory * nodes, nodes=nodes,
        node_cpus=(cpus,) * nodes, node_memory=(0.7 * memory,) * nodes, may_grow=may_grow,
    )  # fmt: skip


def placed(machines: Machines, pixel_bytes: int = PIXELS_224, model_bytes: int = MODEL_BYTES) -> Placement:
    return place(
        machines, rows=10_000_000, actors=None, gpus_per_actor=1.0 if machines.gpus else 0.0, batch_size=None,
        pixel_bytes=pixel_bytes, model_bytes=model_bytes, image_gflop=2.2, output_bytes=6144,
    )  # fmt: skip


def admitted(placement: Placement, machines: Machines, pixel_bytes: int, held: int) -> int:
    """Decoding tasks that Ray Data lets run while each lane has been given `held` blocks."""
    from ray.data._internal.execution.interfaces.execution_options import ExecutionResources as Resources
    from ray.data._internal.execution.resource_manager import ReservationOpResourceAllocator

    block = placement.block_rows * pixel_bytes
    task = 2 * block
    actors = placement.actors.max
    given = placement.lanes * held * block
    running = 0
    inf = float("inf")
    decoding = Resources(cpu=placement.decode_cpus)
    actor = Resources(cpu=placement.actor_cpus, gpu=placement.actor_gpus)
    decode, predict = (_operator(resources, task) for resources in (decoding, actor))
    decode.output_dependencies, predict.input_dependencies = [predict], [decode]
    decode.min_max_resource_requirements = lambda: (
        Resources(cpu=placement.decode_cpus, object_store_memory=task),
        Resources(cpu=inf, gpu=0, memory=0, object_store_memory=inf),
    )
    predict.min_max_resource_requirements = lambda: (
        actor.scale(placement.actors.min),
        actor.scale(actors).copy(object_store_memory=inf),
    )
    manager = MagicMock()
    manager._topology = {decode: None, predict: None}
    manager._is_blocking_materializing_op.return_value = False
    manager.get_mem_op_internal.side_effect = lambda op: running * task if op is decode else 0
    manager.get_mem_op_outputs.side_effect = lambda op, **_: given if op is decode else 0
    manager.get_op_usage.side_effect = lambda op, **_: (
        decoding.scale(running).copy(object_store_memory=running * task + given)
        if op is decode
        else actor.scale(actors)
    )
    allocator = ReservationOpResourceAllocator(manager, 0.5, None, None)
    store = min(placement.stream_bytes, machines.object_store_bytes / 2)
    limits = Resources(cpu=machines.cpus, gpu=machines.gpus, memory=inf, object_store_memory=store)
    while running < 2 * machines.cpus:
        allocator.update_budgets(limits=limits)
        if not allocator.can_submit_new_task(decode):
            break
        running += 1
    return running


def _operator(resources: Any, pending_bytes: int) -> Any:
    class Operator(SimpleNamespace):
        __hash__ = object.__hash__

    return Operator(
        output_dependencies=[],
        input_dependencies=[],
        throttling_disabled=lambda: False,
        has_execution_finished=lambda: False,
        has_completed=lambda: False,
        incremental_resource_usage=lambda: resources,
        min_scheduling_resources=lambda: resources,
        metrics=SimpleNamespace(obj_store_mem_max_pending_output_per_task=pending_bytes),
    )


@pytest.mark.parametrize("held", [0, 1, 2])
@pytest.mark.parametrize(
    ("machines", "pixel_bytes"),
    [
        (cluster(16, 1), PIXELS_224),
        (cluster(128, 8), PIXELS_224),
        (cluster(48, 4), PIXELS_384),
        (cluster(40, 1, nodes=4, may_grow=True), PIXELS_224),
        (cluster(64, 0), PIXELS_224),
        (cluster(16, 0, nodes=32), PIXELS_224),
    ],
)
def test_every_core_that_is_left_decodes(machines: Machines, pixel_bytes: int, held: int) -> None:
    placement = placed(machines, pixel_bytes)
    cores = machines.cpus - placement.actors.max * placement.actor_cpus
    assert admitted(placement, machines, pixel_bytes, held) >= cores / max(placement.decode_cpus, 1.0)


@pytest.mark.parametrize("held", [0, 1, 2])
@pytest.mark.parametrize("cpus", [1, 2, 4, 16])
def test_every_core_decodes_in_a_rehearsal_too(cpus: int, held: int) -> None:
    """Its stream is no larger than it must be, so that its decoders do not get far ahead."""
    machines = cluster(cpus, 0)
    placement = placed(machines)
    placement = placement._replace(stream_bytes=placement.stream_rows * PIXELS_224)
    assert admitted(placement, machines, PIXELS_224, held) >= cpus / max(placement.decode_cpus, 1.0)


def test_a_small_machine_holds_little() -> None:
    assert placed(cluster(2, 0)).stream_bytes == 512 << 20


def test_blocks_shrink_where_the_object_store_is_small() -> None:
    machines = cluster(64, 4)
    assert placed(machines).block_rows == 512
    assert placed(machines._replace(object_store_bytes=8 * GIB)).block_rows == 256


def test_an_actor_that_fits_nowhere_is_told_at_once() -> None:
    """DINOv2-giant, on machines of 8 GiB: Ray would wait for a larger one for ever."""
    with pytest.raises(ClusterError, match=r"needs 9\.1 GB of memory, the largest machine gives Ray 6\.0 GB"):
        placed(cluster(8, 0, nodes=3, memory_gib=8), model_bytes=8 * 1_136_000_000)


def test_an_actor_that_fits_no_machine_with_a_gpu_is_told_too() -> None:
    machines = cluster(16, 1, nodes=2)._replace(node_gpus=(0, 1), node_memory=(50 * GIB, 3 * GIB))
    with pytest.raises(ClusterError, match=r"needs 8\.0 GB of memory, the largest machine gives Ray 3\.2 GB"):
        placed(machines, model_bytes=8_000_000_000)
    assert placed(machines._replace(node_gpus=(1, 1)), model_bytes=8_000_000_000).actors.max == 2


def test_no_more_actors_start_on_gpus_than_memory_carries() -> None:
    """The others would ask a cluster that grows for machines."""
    machines = cluster(16, 4, memory_gib=32)._replace(node_gpus=(4,))
    placement = placed(machines, model_bytes=8_000_000_000)
    assert (placement.actors.min, placement.initial_actors, placement.actors.max) == (3, 3, 4)
    apart = cluster(16, 9)._replace(node_cpus=(8, 8), node_gpus=(8, 1), node_memory=(20e9, 200e9))
    placement = placed(apart, model_bytes=8_000_000_000)
    assert (placement.actors.min, placement.initial_actors, placement.actors.max) == (3, 3, 9)


def test_a_cluster_that_grows_may_bring_a_larger_machine(caplog: pytest.LogCaptureFixture) -> None:
    small = cluster(4, 0, memory_gib=4, may_grow=True)
    assert placed(small, model_bytes=8_000_000_000).actors.max == 1
    needs = "needs 8.0 GB of memory, the largest machine gives Ray 3.0 GB: the job waits until the cluster has a larger"
    assert needs in caplog.text
    caplog.clear()
    placed(cluster(4, 0, memory_gib=16, may_grow=True), model_bytes=8_000_000_000)
    assert not caplog.text


def test_actors_that_share_gpus_are_counted_by_machine() -> None:
    """What is left of one machine's GPU does not add up with what is left of another's."""
    machines = cluster(16, 1, nodes=3)._replace(gpus=3, node_gpus=(1, 1, 1))
    placement = place(
        machines, rows=10_000, actors=None, gpus_per_actor=0.6, batch_size=None, pixel_bytes=PIXELS_224,
        model_bytes=MODEL_BYTES,
    )  # fmt: skip
    assert placement.actors.max == 3


def test_a_job_that_waits_for_a_larger_machine_says_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def begun(*arguments: object) -> None:
        told.extend(record.getMessage() for record in caplog.records)
        raise Interrupted("told to stop", 15)

    told: list[str] = []
    monkeypatch.setattr("pipeline.flow.build", begun)
    (tmp_path / "a.jpg").touch()
    values = {"sources": [str(tmp_path / "a.jpg")], "model": "null", "out": str(tmp_path / "o"), "backend": "null"}
    tiny = cluster(4, 0, may_grow=True)._replace(node_memory=(1000.0,))
    with pytest.raises(Interrupted):
        run(build_spec(values), lambda: nullcontext(tiny))
    assert [line for line in told if "the job waits until the cluster has a larger one" in line]


@pytest.mark.parametrize("may_grow", [True, False])
@pytest.mark.parametrize(("gpus", "one_call"), [(0, False), (0, True), (1, False)])
def test_a_job_is_not_laid_out_for_a_cluster_without_cores(may_grow: bool, gpus: int, one_call: bool) -> None:
    """Workers scaled to zero, or GPUs beside which nothing can be decoded: it would keep to one core for its life."""
    empty = Machines(cpus=0, gpus=gpus, object_store_bytes=0, may_grow=may_grow)
    with pytest.raises(ClusterError, match=r"0 CPUs.* Give --cluster-wait 900 .*`min_workers`.*`ray start` on each"):
        place(
            empty, rows=100, actors=None, gpus_per_actor=float(gpus), batch_size=None, pixel_bytes=PIXELS_224,
            model_bytes=MODEL_BYTES, one_call=one_call,
        )  # fmt: skip


def test_memory_for_few_actors_gives_each_more_cores() -> None:
    """ViT-L on four cores with 4 GiB."""
    placement = placed(cluster(4, 0, memory_gib=4), model_bytes=8 * 304_000_000)
    assert (placement.actors.min, placement.actors.max, placement.actor_calls, placement.threads) == (1, 1, 4, 1)
    placement = placed(cluster(16, 0, memory_gib=4), model_bytes=8 * 304_000_000)
    assert (placement.actors.max, placement.actor_calls, placement.threads) == (1, 8, 2)

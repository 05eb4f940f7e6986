"""How a job is cut and placed: no Ray, but the plan that Ray would carry out."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.placement import place
from schemas.errors import ClusterError
from schemas.machines import Machines
from schemas.spec import build_spec
from schemas.values import ActorRange

# Ray's own deprecations, about Ray's own code.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

GIB = 1 << 30
LAPTOP = Machines(cpus=2, gpus=0, object_store_bytes=2 * GIB)
GPU_BOX = Machines(cpus=64, gpus=4, object_store_bytes=64 * GIB)
PIXELS = 224 * 224 * 3


def placed(machines: Machines = LAPTOP, **options: object) -> object:
    values = {
        "rows": 100_000, "actors": None, "gpus_per_actor": 0.0, "batch_size": None, "pixel_bytes": PIXELS,
        "model_bytes": 8 * 86_000_000,
    }  # fmt: skip
    return place(machines, **{**values, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [1, 7, 255, 1000, 4097])
def test_tasks_cover_every_pending_row_once(rows: int) -> None:
    from pipeline.decoding import cut

    rng = np.random.default_rng(rows)
    edges = np.unique(rng.integers(0, 10 * rows, 2 * min(rows, 40)))
    spans = edges[: len(edges) // 2 * 2].reshape(-1, 2)
    want = [row for start, stop in spans.tolist() for row in range(start, stop)]
    tables = list(cut(spans, [64] * -(-len(want) // 64)))
    got = [[row for span in task.to_pylist() for row in range(span["start"], span["stop"])] for task in tables]
    assert [row for task in got for row in task] == want
    assert all(len(task) == 64 for task in got[:-1])


@pytest.mark.parametrize("cpus", [1, 2, 4, 8, 16, 96])
def test_actors_and_a_decoder_always_fit_on_cpus(cpus: int) -> None:
    machines = LAPTOP._replace(cpus=cpus)
    for actors in (None, ActorRange(min=1, max=1), ActorRange(min=2, max=3), ActorRange(min=1, max=64)):
        placement = placed(machines, actors=actors)
        carried = max(placement.actors.min, min(placement.actors.max, int(cpus / placement.actor_cpus + 1e-9)))
        assert carried * placement.actor_cpus + placement.decode_cpus <= cpus + 1e-9


@pytest.mark.parametrize("nodes", [(1.0, 1.0), (2.0, 2.0, 2.0), (3.0,) * 4, (16.0, 16.0), (4.0, 8.0, 64.0)])
@pytest.mark.parametrize("actors", [None, ActorRange(min=1, max=3), ActorRange(min=4, max=4)])
def test_an_actor_fits_on_every_node_beside_a_decoder(nodes: tuple[float, ...], actors: ActorRange | None) -> None:
    cluster = LAPTOP._replace(cpus=sum(nodes), nodes=len(nodes), node_cpus=nodes)
    placement = placed(cluster, actors=actors, rows=100_000)
    assert placement.actor_cpus + placement.decode_cpus <= min(nodes)
    assert placement.actor_calls * placement.threads <= min(nodes)
    carried = [int((cpus - placement.decode_cpus) / placement.actor_cpus + 1e-9) for cpus in nodes]
    assert sum(carried) >= placement.actors.min


def test_actors_that_may_grow_wait_for_nodes_to_come() -> None:
    """Eight actors on two nodes of today would leave nothing to ask further nodes for."""
    two = LAPTOP._replace(cpus=2, nodes=2, node_cpus=(1.0, 1.0))
    placement = placed(two, actors=ActorRange(min=1, max=8))
    assert placement.actors == ActorRange(min=1, max=8)
    assert int(1 / placement.actor_cpus) == 1


@pytest.mark.parametrize("nodes", [*((float(cores),) for cores in range(1, 65)), (7.0,) * 4, (8.0, 6.0), (4.0, 64.0)])
def test_hardly_a_core_is_left_without_a_thread(nodes: tuple[float, ...]) -> None:
    machines = LAPTOP._replace(cpus=sum(nodes), nodes=len(nodes), node_cpus=nodes)
    for one_call in (False, True):
        placement = placed(machines, one_call=one_call)
        assert placement.lanes * placement.threads >= 0.9 * sum(nodes)
        assert placement.actor_calls * placement.threads <= min(nodes)


@pytest.mark.parametrize("cores", range(1, 129))
def test_one_actor_divides_a_whole_machine_among_its_calls(cores: int) -> None:
    placement = placed(LAPTOP._replace(cpus=cores, node_cpus=(float(cores),)), actors=ActorRange(min=1, max=1))
    assert min(cores, 3) <= placement.actor_calls <= 8
    assert 0.9 * cores <= placement.actor_calls * placement.threads <= cores


def test_memory_for_fewer_actors_gives_each_more_cores() -> None:
    model = 1 << 30
    two = LAPTOP._replace(cpus=80, nodes=2, node_cpus=(16.0, 64.0), node_gpus=(0.0, 0.0))
    placement = placed(two._replace(node_memory=(2.0 * model, 36.0 * model)), model_bytes=model)
    assert (placement.actor_calls * placement.threads, placement.actors.max) == (4, 20)
    placement = placed(two._replace(node_memory=(2.0 * model, 8.0 * model)), model_bytes=model)
    assert (placement.actor_calls * placement.threads, placement.actors.max) == (8, 10)


def test_two_cores_carry_one_actor_of_two_calls() -> None:
    placement = placed()
    assert (placement.actors.max, placement.actor_calls, placement.threads) == (1, 2, 1)


def test_actors_of_one_call_are_one_for_each_of_two_cores() -> None:
    placement = placed(one_call=True)
    assert (placement.actors.max, placement.actor_calls, placement.threads) == (2, 1, 1)


def test_no_more_actors_than_cores_are_made(caplog: pytest.LogCaptureFixture) -> None:
    many = ActorRange(min=99, max=99)
    assert placed(actors=many).actors == ActorRange(min=2, max=2)
    assert "--actors 99: there are 2 cores and so many actors" in caplog.text
    caplog.clear()
    assert placed(LAPTOP._replace(may_grow=True), actors=many).actors == many
    assert placed(actors=many, one_call=True).actors == many, "they wait for a server"
    assert not caplog.text


def test_gpus_decide_the_number_of_actors() -> None:
    placement = placed(GPU_BOX, gpus_per_actor=1.0)
    assert (placement.actors.min, placement.actors.max, placement.actor_gpus) == (4, 4, 1.0)
    assert placed(GPU_BOX, gpus_per_actor=0.5).actors.max == 8
    assert placed(GPU_BOX, gpus_per_actor=1.0, actors=ActorRange(min=1, max=64)).initial_actors == 4
    assert placed(GPU_BOX, gpus_per_actor=1.0, actors=ActorRange(min=1, max=3)).initial_actors == 3
    few = placed(GPU_BOX, gpus_per_actor=1.0, actors=ActorRange(min=1, max=4), rows=10)
    assert few.initial_actors == 1, "one computes them all"


@pytest.mark.parametrize(
    ("node_cpus", "gpus", "each"),
    [((1,), 1, 1.0), ((4,), 1, 0.25), ((8,), 8, 1.0), ((4, 4), 2, 0.25), ((64,), 4, 1.0), ((2, 96), 2, 1.0)],
)
def test_actors_on_gpus_leave_cores_to_decode_on(node_cpus: tuple[int, ...], gpus: int, each: float) -> None:
    machines = GPU_BOX._replace(cpus=sum(node_cpus), gpus=gpus, nodes=len(node_cpus), node_cpus=node_cpus)
    placement = placed(machines, gpus_per_actor=each)
    actors = placement.actors.max
    assert actors == gpus / each
    here = -(-actors // len(node_cpus))
    assert here * placement.actor_cpus + placement.decode_cpus <= min(node_cpus)


@pytest.mark.parametrize(
    ("node_cpus", "node_gpus", "each"),
    [((3, 16, 16, 16, 16), (1, 0, 0, 0, 0), 0.25), ((6, 15, 15), (1, 0, 0), 0.125), ((16, 4, 8), (0, 2, 1), 0.25)],
)
def test_actors_that_share_a_gpu_fit_on_its_node(
    node_cpus: tuple[int, ...], node_gpus: tuple[int, ...], each: float
) -> None:
    """Nodes without one carry none of them, and leave them no cores."""
    memory = (64e9,) * len(node_cpus)
    nodes = {"nodes": len(node_cpus), "node_cpus": node_cpus, "node_gpus": node_gpus, "node_memory": memory}
    machines = GPU_BOX._replace(cpus=sum(node_cpus), gpus=sum(node_gpus), **nodes)
    placement = placed(machines, gpus_per_actor=each)
    assert placement.actors.max == sum(node_gpus) / each
    for cores, gpus in zip(node_cpus, node_gpus, strict=True):
        assert gpus / each * placement.actor_cpus + placement.decode_cpus <= cores


@pytest.mark.parametrize(("each", "fit"), [(0.6, 8), (1 / 3, 24), (0.1, 80), (1.0, 8)])
def test_no_actor_has_a_share_of_two_gpus(each: float, fit: int) -> None:
    """Ray gives less than one GPU from one GPU."""
    machines = GPU_BOX._replace(gpus=8.0, node_cpus=(64.0,), node_gpus=(8.0,), node_memory=(2e12,))
    assert placed(machines, gpus_per_actor=each, rows=10**7).actors.max == fit
    assert placed(machines, gpus_per_actor=each, actors=ActorRange(min=fit, max=fit)).actors.min == fit
    more = ActorRange(min=fit + 1, max=fit + 1)
    with pytest.raises(ClusterError, match=rf"× --actors {fit + 1}.* needs 9 GPUs, the cluster has 8 GPUs"):
        placed(machines, gpus_per_actor=each, actors=more)


def test_gpus_that_are_not_there() -> None:
    with pytest.raises(ClusterError, match=r"needs 8 GPUs, the cluster has 4 GPUs and 64 CPUs"):
        placed(GPU_BOX, gpus_per_actor=2.0, actors=ActorRange(min=4, max=4))
    with pytest.raises(ClusterError, match=r"leave out --gpus-per-actor.*--gpus-per-actor 0") as caught:
        placed(LAPTOP, gpus_per_actor=1.0)
    assert "--cluster-wait" not in str(caught.value)
    with pytest.raises(ClusterError, match=r"give --cluster-wait 900 where the cluster grows by itself, or leave out"):
        placed(LAPTOP._replace(may_grow=True), gpus_per_actor=1.0)


def test_small_jobs_are_spread_and_large_ones_are_bounded() -> None:
    assert len(list(placed(rows=64).task_sizes(64))) >= 4
    assert len(list(placed(rows=10**9).task_sizes(10**9))) <= 20_000
    assert placed(rows=10**6).block_rows * PIXELS <= 9 * (1 << 20)


@pytest.mark.parametrize("machines", [LAPTOP, GPU_BOX])
@pytest.mark.parametrize("rows", [1, 9, 100, 1000, 12_345, 10**6])
def test_tasks_shrink_towards_the_end(machines: Machines, rows: int) -> None:
    placement = placed(machines, rows=rows)
    sizes = list(placement.task_sizes(rows))
    assert sum(sizes) == rows
    assert sizes == sorted(sizes, reverse=True)
    assert all(size % placement.block_rows == 0 and size <= placement.task_rows for size in sizes[:-1])
    assert sizes[-1] <= placement.block_rows
    # What is left when the last long task begins keeps the other cores busy while it lasts.
    for number, size in enumerate(sizes):
        assert size <= max(placement.block_rows, sum(sizes[number:]) / machines.cpus)


def test_slow_models_get_small_blocks() -> None:
    """What is in a block when a machine dies is lost, so a block is seconds of work on a CPU."""
    assert placed(image_gflop=120.0).block_rows == placed(image_gflop=120.0).batch_size
    assert placed(image_gflop=1.0).block_rows > 4 * placed(image_gflop=120.0).block_rows


@pytest.mark.parametrize(("image_gflop", "batch"), [(1.0, 8), (34.0, 8), (119.0, 4), (832.0, 1)])
def test_a_batch_on_a_cpu_is_seconds_of_work(image_gflop: float, batch: int) -> None:
    """ViT-Ti, B and L at 224 pixels, DINOv2-L at 518."""
    assert placed(image_gflop=image_gflop).batch_size == batch
    assert placed(image_gflop=image_gflop, batch_size=8).batch_size == 8, "what was asked for is kept"


@pytest.mark.parametrize(("rows", "batch"), [(1, 1), (8, 4), (15, 4), (16, 8), (1000, 8)])
def test_every_core_gets_a_batch_of_a_small_job(rows: int, batch: int) -> None:
    placement = placed(rows=rows)
    assert placement.batch_size == batch
    assert -(-rows // batch) >= min(rows, placement.lanes)


@pytest.mark.parametrize(
    ("image_gflop", "rows", "batch"), [(1.0, 100_000, 64), (34.0, 100_000, 8), (832.0, 100_000, 1), (1.0, 1000, 8)]
)
def test_requests_are_as_large_as_a_server_takes_them(image_gflop: float, rows: int, batch: int) -> None:
    machines = Machines(cpus=16, gpus=0, object_store_bytes=16 * GIB)
    served = {"one_call": True, "served_batch": 64, "in_flight": 4, "image_gflop": image_gflop, "rows": rows}
    placement = placed(machines, **served)
    assert placement.batch_size == batch, "not what four cores here would compute"
    assert placement.block_rows % (4 * batch) == 0 or placement.block_rows == batch == 1
    assert -(-rows // placement.block_rows) >= 4 * placement.actors.max == 16
    asked = placed(machines, **served, batch_size=8)
    assert (asked.batch_size, asked.block_rows % 32) == (8, 0)


@pytest.mark.parametrize("cpus", [2, 16, 64, 256])
@pytest.mark.parametrize("image_gflop", [34.0, 519.0])
def test_a_slow_server_answers_all_actors_in_time(cpus: int, image_gflop: float) -> None:
    """ViT-B and DINOv2-giant at 224 pixels; a block is as much as is under way, so that it is soon done."""
    machines = Machines(cpus=cpus, gpus=0, object_store_bytes=16 * GIB)
    served = {"one_call": True, "served_batch": 64, "in_flight": 4, "image_gflop": image_gflop}
    placement = placed(machines, **served, rows=10_000_000)
    under_way = placement.actors.max * min(placement.block_rows, 4 * placement.batch_size) * image_gflop
    assert under_way <= 6000 or placement.block_rows == 1
    assert placement.block_rows * image_gflop <= 6000
    pixels = 3 * 518 * 518
    asked = placed(machines, **served, rows=10_000_000, batch_size=64, pixel_bytes=pixels)
    assert asked.batch_size == 64
    assert asked.block_rows == 64 or asked.block_rows * pixels <= 128 * 2**20
    assert asked.block_rows % 64 == 0, "else requests would have fewer than were asked for"


@pytest.mark.slow
def test_decoding_is_not_fused_into_the_actor(tmp_path: Path) -> None:
    """Ray Data fuses stages with equal resources; ours must stay two operators."""
    import ray

    from cluster.session import ray_session
    from pipeline.flow import build
    from pipeline.opening import ResolvedJob, open_directory, resolve_job

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"x")
    spec = build_spec(
        {"sources": [str(tmp_path / "in")], "model": "null", "out": str(tmp_path / "o"), "backend": "null"}
    )
    resolved: ResolvedJob = resolve_job(spec)
    opened = open_directory(resolved)
    with ray_session(cpus=2) as machines:
        placement = placed(machines, rows=1)
        of_others = ray.data.DataContext.get_current().copy()
        dataset = build(resolved, opened, placement, np.array([[0, 1]]))
        now = ray.data.DataContext.get_current()
        for name in ("target_max_block_size", "execution_no_progress_timeout_s", "enable_progress_bars"):
            assert getattr(now, name) == getattr(of_others, name), "other datasets of the process are not ours to set"
        assert now.execution_options.resource_limits == of_others.execution_options.resource_limits
        assert dataset.context.execution_options.resource_limits.object_store_memory == placement.stream_bytes
        assert dataset.context.target_max_block_size == 1 << 20, "smaller ones pile up in the driver's own memory"
        wanted = resolved.wanted._replace(features=("cls",), dims=(1 << 20,))
        placement = placement._replace(row_bytes=4 << 20)
        large = build(resolved._replace(wanted=wanted), opened, placement, np.array([[0, 1]]))
        target = large.context.target_max_block_size
        # Ray Data cuts a block that exceeds its target by half.
        assert target < placement.block_rows * (4 << 20) < 1.5 * target, "a block neither stays open nor is cut"
        assert dataset.context.execution_no_progress_timeout_s == -1, "lost machines may be long in coming back"
        rows = dataset.take_all()
        plan = dataset.stats()
        assert len(rows) == 1
        assert "MapBatches(decode_rows)" in plan
        assert "MapBatches(PredictActor)" in plan
        assert "decode_rows)->" not in plan
        blocks = ray.data.from_arrow([pa.table({"x": [1]}), pa.table({"x": [2]})])
        fused = blocks.map_batches(_same, num_cpus=1).map_batches(_Same, num_cpus=1, concurrency=1)
        fused.take_all()
        assert ")->MapBatches(_Same)" in fused.stats(), (
            "Ray no longer fuses these: the check above has lost its meaning"
        )


def _same(batch: object) -> object:
    return batch


class _Same:
    def __call__(self, batch: object) -> object:
        return batch


@pytest.mark.parametrize("cores", [8, 16, 32])
@pytest.mark.parametrize("side", [224, 384, 518])
def test_a_block_for_a_gpu_has_batches_to_hide_copies_behind(cores: int, side: int) -> None:
    pixel_bytes = side * side * 3
    machines = Machines(cpus=cores, gpus=1, object_store_bytes=cores * GIB)
    placement = placed(machines, gpus_per_actor=1.0, pixel_bytes=pixel_bytes)
    assert placement.block_rows == 2 * placement.batch_size
    assert placement.block_rows * pixel_bytes <= 128 << 20
    of_today = placed(machines, gpus_per_actor=1.0, pixel_bytes=pixel_bytes, batch_size=64)
    assert of_today.batch_size == 64, "what was asked for is kept"


def test_patch_features_take_room_of_their_own() -> None:
    """ViT-L at 224 pixels: 401,408 bytes an image; DINOv2-giant at 518: 4.2 MB."""
    machines = Machines(cpus=16, gpus=1, object_store_bytes=16 << 30)
    plain = placed(machines, gpus_per_actor=1.0)
    large = placed(machines, gpus_per_actor=1.0, output_bytes=196 * 1024 * 2)
    giant = placed(machines, gpus_per_actor=1.0, output_bytes=1369 * 1536 * 2)
    assert (plain.block_rows, large.block_rows, large.batch_size) == (512, 256, 128)  # type: ignore[attr-defined]
    assert giant.batch_size * 1369 * 1536 * 2 <= 128 << 20  # type: ignore[attr-defined]
    on_cpus = placed(LAPTOP, output_bytes=196 * 1024 * 2)
    assert on_cpus.block_rows * 196 * 1024 * 2 <= 8 << 20  # type: ignore[attr-defined]

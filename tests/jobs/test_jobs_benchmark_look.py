"""What `patchstream benchmark` rehearses and tells, with measurements and a job that are given."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.checkpoints import make_checkpoint

from jobs.benchmark import look, result, show
from pipeline.advice import Forward, Measured
from pipeline.flow import Summary
from pipeline.opening import ResolvedJob, resolve_job
from pipeline.predicting import place_job
from pipeline.progress import Progress
from pipeline.rehearsal import rows_to_rehearse
from schemas.attempt import AttemptRecord
from schemas.errors import SpecError
from schemas.machines import Machines
from schemas.spec import JobSpec, build_spec

pytestmark = pytest.mark.timeout(120)

MACHINES = Machines(4, 0, 1e9, 1, (4.0,))
# 100 images a second on each core.
FAST = Measured(
    sampled=48, listed=1000, failed=0, file_bytes=1e5, fetch_s=1e-6, fetch_core_s=0.0,
    decode_core_s={"exact": 4e-3, "fast": 4e-3}, fast_cosines=[], transfer_core_s=0.0,
    forward=[Forward("float32", 8, 1, 6e-3, [])], write_s=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "vit", "vit-classifier")


def spec_for(checkpoint: Path, **values: Any) -> JobSpec:
    return build_spec({"sources": ["photos"], "model": str(checkpoint), "out": "memory://o", **values})


class Given:
    """A cluster of `machines`, measurements, and a job whose rows come in `batches` a second apart."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.machines, self.measured, self.batches = MACHINES, FAST, 50
        self.clock = 0.0
        self.rehearsed: list[JobSpec] = []
        monkeypatch.setattr("cluster.session.ray_session", self.connect)
        monkeypatch.setattr("cluster.remote.call", lambda *_, **__: self.measured)
        monkeypatch.setattr("pipeline.rehearsal.run", self.run)
        for module in ("jobs.benchmark", "pipeline.rehearsal"):
            monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=lambda: self.clock))

    @contextmanager
    def connect(self, address: str | None, **_: Any) -> Iterator[Machines]:
        self.clock += 5.0
        yield self.machines

    def run(self, spec: JobSpec, connect: Any, listen: Callable[[Progress], None], place: Any) -> Summary:
        self.rehearsed.append(spec)
        assert spec.limit is not None
        for batch in range(self.batches):
            self.clock += 1.0
            listen(Progress("running", done=spec.limit * (batch + 1) // self.batches))
        attempt = AttemptRecord(
            attempt=1, shard_index=0, shard_count=1, started="", host="h", pid=1, startup_s=2.0
        )  # fmt: skip
        return Summary(spec.out, spec.limit, spec.limit, 0, attempt)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    return Given(monkeypatch)


@pytest.mark.parametrize(("listed", "times"), [(1000, 4), (300, 14), (4000, 1)])
def test_a_source_is_named_until_it_has_all_images_of_the_rehearsal(
    given: Given, checkpoint: Path, listed: int, times: int
) -> None:
    """A thousand are all that is listed, however many there are; where no more are, half a second would be all."""
    given.measured = FAST._replace(listed=listed)
    together = look(spec_for(checkpoint), 20.0, None, 0.0, None, False)[-1]
    (spec,) = given.rehearsed
    assert spec.limit == together.images == 4000
    assert spec.sources == ("photos",) * times
    assert together.images_per_s == pytest.approx(80.0)


def test_the_cores_that_actors_on_gpus_book_decode_nothing(given: Given, checkpoint: Path) -> None:
    given.machines = Machines(8, 2, 1e9, 1, (8.0,), (2.0,), (64e9,))
    given.measured = FAST._replace(forward=[Forward("float32", 8, 0, 1e-3, [])])
    shape = look(spec_for(checkpoint, gpus_per_actor=1, dtype="float32"), 20.0, None, 0.0, None, False)[1]
    assert (shape.cpus, shape.gpus, shape.actor_cpus) == (8, 2, 2)


def test_an_actor_that_has_a_gpu_alone_has_its_whole_rate(given: Given, checkpoint: Path) -> None:
    """However small the share that it books: there is no room beside it for another."""
    given.machines = Machines(8, 2, 1e9, 1, (8.0,), (2.0,), (64e9,))
    given.measured = FAST._replace(forward=[Forward("float32", 8, 0, 1e-3, [])])
    shape = look(spec_for(checkpoint, gpus_per_actor=0.6, dtype="float32"), 20.0, None, 0.0, None, False)[1]
    assert (shape.gpus, shape.actor_cpus) == (2, 2)


def test_the_start_of_ray_is_part_of_the_start_up(
    given: Given, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, shape, placement, together = look(spec_for(checkpoint), 20.0, None, 0.0, None, False)
    assert together.startup_s == 5.0 + 2.0
    show(result(measured, shape, placement, together), measured, shape)
    told = capsys.readouterr().out
    assert "after 7 s of start-up, Ray's included;" in told
    assert "included; before that the model is read and the images are listed." in told
    assert look(spec_for(checkpoint), 20.0, "h:1", 900.0, None, False)[-1].startup_s == 2.0, "waiting is no start-up"


def test_the_rate_of_the_rehearsal_has_one_name(
    given: Given, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, shape, placement, together = look(spec_for(checkpoint), 20.0, None, 0.0, None, False)
    found = result(measured, shape, placement, together)
    assert [name for name, value in found.items() if value == together.images_per_s] == ["predicted_images_per_s"]
    show(found, measured, shape)
    assert "80.0   20% of it, measured on 4000 images" in capsys.readouterr().out


@pytest.mark.parametrize(("listed", "said"), [(1000, True), (300, False)])
def test_who_has_more_images_is_told_that_the_first_alone_were_looked_at(
    given: Given, checkpoint: Path, capsys: pytest.CaptureFixture[str], listed: int, said: bool
) -> None:
    """Of two sources these may all be of one."""
    given.measured = FAST._replace(listed=listed)
    measured, shape, placement, together = look(spec_for(checkpoint), 20.0, None, 0.0, None, False)
    show(result(measured, shape, placement, together), measured, shape)
    told = capsys.readouterr().out
    assert f"48 of {listed:,} images listed, " in told
    assert ("listed, the first of the sources, which alone were looked at, 100.0 kB each" in told) == said


def test_without_two_batches_there_is_no_rate(given: Given, checkpoint: Path) -> None:
    given.batches = 1
    with pytest.raises(SpecError, match=r"--seconds 20: all 4000 images of the rehearsal came at once.* give more"):
        look(spec_for(checkpoint), 20.0, None, 0.0, None, False)


@pytest.mark.parametrize("actors", [None, {"min": 2, "max": 8}])
def test_what_is_not_counted_is_what_the_rehearsal_itself_works_on(
    checkpoint: Path, actors: dict[str, int] | None
) -> None:
    resolved: ResolvedJob = resolve_job(spec_for(checkpoint, actors=actors))
    images, tail = rows_to_rehearse(resolved, MACHINES, place_job(resolved, MACHINES, 1_000_000), 100.0)
    own = place_job(resolved, MACHINES, images)
    assert tail == max(min(own.lanes, 4) * own.block_rows, min(own.stream_rows, images // 4))
    assert images >= 4 * tail

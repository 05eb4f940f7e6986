"""A job on a GPU, which Ray was only told of: that it runs, and that an actor has two calls at once."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support.commands import table

from pipeline import flow
from pipeline.predictors.null import null_features
from schemas.machines import Machines
from schemas.spec import build_spec

pytestmark = pytest.mark.slow


@pytest.fixture
def gpus() -> int:
    return 1


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch, gpus: int) -> Iterator[Callable[[], AbstractContextManager[Machines]]]:
    import ray

    from cluster import session

    start = session._start
    monkeypatch.setattr(session, "_start", lambda cpus: {**start(cpus), "num_gpus": gpus})
    with session.ray_session(cpus=2) as machines:
        assert ray.cluster_resources()["GPU"] == gpus
        yield lambda: nullcontext(machines)


def test_on_a_gpu_the_next_block_is_handed_over_while_one_is_predicted(
    tmp_path: Path, connect: Callable[[], AbstractContextManager[Machines]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, real = tmp_path / "seen", flow.PredictActor
    seen.mkdir()

    class Slow(real):  # type: ignore[misc, valid-type]
        inside = 0

        def __call__(self, decoded: pa.Table) -> pa.Table:
            self.inside += 1
            until = time.monotonic() + (0 if any(seen.iterdir()) else 20)
            while self.inside < 2 and time.monotonic() < until:
                time.sleep(0.01)
            (seen / f"{self.inside}-{decoded['row'][0]}-{decoded.num_rows}").touch()
            predicted = super().__call__(decoded)
            self.inside -= 1
            return predicted

    monkeypatch.setattr(flow, "PredictActor", Slow)
    (tmp_path / "in").mkdir()
    for number in range(240):
        (tmp_path / "in" / f"{number:03}.jpg").write_bytes(os.urandom(8))
    values = {"sources": [str(tmp_path / "in")], "model": "null", "backend": "null", "gpus_per_actor": 1.0}
    spec = build_spec({**values, "out": str(tmp_path / "o"), "batch_size": 4, "sink": {"commit_s": 1.0}})
    summary = flow.run(spec, connect)
    assert (summary.images, summary.failures) == (240, 0)
    inside, _, rows = zip(*(path.name.split("-") for path in seen.iterdir()), strict=True)
    assert max(inside) == "2"
    assert rows == ("60",) * 4, "whole blocks, as they were cut"
    written = table(tmp_path / "o")
    assert written["row"].to_pylist() == list(range(240))
    features = np.array(written["cls"].to_pylist())
    assert np.allclose(features, null_features(np.arange(240), features.shape[1]), atol=1e-6)


@pytest.mark.parametrize("gpus", [2])
@pytest.mark.parametrize("actors", [None, {"min": 1, "max": 2}])
def test_actors_start_side_by_side(
    tmp_path: Path,
    connect: Callable[[], AbstractContextManager[Machines]],
    monkeypatch: pytest.MonkeyPatch,
    actors: dict[str, int] | None,
) -> None:
    """One after the other, each would be alone with its start-up."""
    seen, real = tmp_path / "seen", flow.PredictActor
    seen.mkdir()

    class Waiting(real):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: object) -> None:
            (seen / f"begun-{os.getpid()}").touch()
            until = time.monotonic() + 30
            while (begun := len(list(seen.glob("begun-*")))) < 2 and time.monotonic() < until:
                time.sleep(0.01)
            (seen / f"side-by-side-{os.getpid()}-{begun}").touch()
            super().__init__(*arguments)

    monkeypatch.setattr(flow, "PredictActor", Waiting)
    (tmp_path / "list.csv").write_text("uri\n" + "".join(f"http://nowhere/{i}.jpg\n" for i in range(240)))
    values = {"sources": [str(tmp_path / "list.csv")], "model": "null", "backend": "null", "gpus_per_actor": 1.0}
    spec = build_spec({**values, "out": str(tmp_path / "o"), "batch_size": 4, "actors": actors})
    assert flow.run(spec, connect).images == 240
    assert [path.name.rpartition("-")[2] for path in seen.glob("side-by-side-*")] == ["2", "2"]

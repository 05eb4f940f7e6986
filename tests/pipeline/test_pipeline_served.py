"""How a job is placed whose model a Triton server has: its actors load no weights."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.checkpoints import make_checkpoint

from pipeline.opening import ResolvedJob, resolve_job
from pipeline.predicting import place_job
from schemas.machines import Machines
from schemas.spec import build_spec

GIB = 1 << 30
SMALL = Machines(8, 0, 2 * GIB, 1, (8.0,), node_memory=(2 * GIB,), node_gpus=(0.0,))


@pytest.fixture
def resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResolvedJob:
    """A job with a model of the size of DINOv2-giant, which a server elsewhere has."""
    served = SimpleNamespace(dtype="float16", max_batch_size=64)
    monkeypatch.setattr("pipeline.predictors.triton.check_server", lambda info, wanted, spec: served)
    model = make_checkpoint(tmp_path / "vit", "vit", image_size=32, hidden_size=64, num_attention_heads=2)
    values = {"sources": ["x"], "model": str(model), "out": "memory://o", "backend": "triton"}
    job = resolve_job(build_spec({**values, "triton": {"url": "grpc://triton:8001"}}))
    assert job.info is not None
    return job._replace(info=replace(job.info, parameters=1_136_000_000))


def test_an_actor_books_no_memory_for_weights_that_a_server_has(resolved: ResolvedJob) -> None:
    placement = place_job(resolved, SMALL, rows=100_000)
    assert placement.actors.max == 2
    assert 0 < placement.actor_memory_bytes < GIB, "Ray Data fuses stages that book the same"


def test_no_request_is_larger_than_the_server_takes(resolved: ResolvedJob) -> None:
    asked = resolved._replace(spec=resolved.spec.model_copy(update={"batch_size": 100}))
    assert place_job(asked, SMALL, rows=100_000).batch_size == 64

"""A rehearsal leaves nothing behind, and says so."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.checkpoints import make_checkpoint

from pipeline.opening import resolve_job
from pipeline.predicting import place_job
from pipeline.rehearsal import rehearse
from schemas.errors import Interrupted
from schemas.machines import Machines
from schemas.spec import build_spec

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_interrupts_it_is_told_that_nothing_was_kept(tmp_path: Path, number: signal.Signals) -> None:
    pq.write_table(pa.table({"uri": ["s3://nowhere/0.jpg"]}), tmp_path / "rows.parquet")
    spec = build_spec(
        {"sources": [str(tmp_path / "rows.parquet")], "model": "null", "backend": "null", "out": "memory://o"}
    )
    (tmp_path / "scratch").mkdir()

    @contextmanager
    def interrupted() -> Iterator[Machines]:
        signal.raise_signal(number)
        yield Machines(1, 0, 1e9)

    with pytest.raises(Interrupted) as stopped:
        rehearse(spec, interrupted, images=1, listed=1, tail=1, scratch=str(tmp_path / "scratch"))
    assert str(stopped.value) == "interrupted; nothing was kept, the same command begins again"
    assert stopped.value.exit_code == 128 + number
    assert list((tmp_path / "scratch").iterdir()) == []


def test_its_decoders_are_not_further_ahead_than_those_of_a_long_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a model loads, 512 MiB have room for 3,500 images: all of a rehearsal, which then has the cores for its
    forward passes alone."""
    placed: list[Any] = []

    def run(spec: Any, connect: Any, listen: Any, place: Any) -> Any:
        placed.append(place(resolve_job(spec), machines, spec.limit))
        raise Interrupted("seen", 2)

    monkeypatch.setattr("pipeline.rehearsal.run", run)
    machines = Machines(2, 0, 4e9, 1, (2.0,))
    model = make_checkpoint(tmp_path / "vit", "vit-classifier", image_size=224, hidden_size=64, num_attention_heads=2)
    spec = build_spec({"sources": ["x"], "model": str(model), "out": "memory://o", "batch_size": 8})
    with pytest.raises(Interrupted):
        rehearse(spec, lambda: pytest.fail("not entered"), images=400, listed=400, tail=8)
    resolved = resolve_job(spec)
    usual = place_job(resolved, machines, 400)
    assert placed == [usual._replace(stream_bytes=usual.stream_rows * resolved.pixel_bytes)]
    assert placed[0].stream_bytes < usual.stream_bytes

"""A rehearsal leaves nothing behind, and says so."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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

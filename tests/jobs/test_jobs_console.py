"""What a person reads at the end of a run: places as they are, whatever characters are in them and however long."""

import pytest

from jobs.console import print_summary
from pipeline.flow import Summary
from schemas.attempt import AttemptRecord


def attempt() -> AttemptRecord:
    return AttemptRecord(
        attempt=1, shard_index=0, shard_count=1, started="2026-01-01T00:00:00+00:00", host="h", pid=1, status="done",
        command="embed", rows_planned=3, images=2, failures=1, wall_s=1.5, images_per_s=2.0,
    )  # fmt: skip


@pytest.mark.parametrize("failures", [0, 1])
@pytest.mark.parametrize(
    "out", ["/data/photos[v2]/out", "/data/[/old]", "/data/[red]/x", "/data/:heart:", f"/{'long name/' * 20}out"]
)
def test_places_are_printed_as_they_are(capsys: pytest.CaptureFixture[str], out: str, failures: int) -> None:
    print_summary(Summary(out, 3, 3 - failures, failures, attempt()), f"{out}/report.html", f"{out}/maps")
    lines = capsys.readouterr().out.splitlines()
    told = {line[:15].rstrip(): line[16:] for line in lines[:-1]}
    assert told["images"] == f"{3 - failures} of 3"
    assert told["this attempt"] == "3 rows in 1.5 s, 2.0/s once all ran"
    assert told["dataset"] == f"{out}/images/*.parquet"
    assert told["report"] == f"{out}/report.html"
    assert told["attention maps"] == f"{out}/maps"
    assert out in lines[-1]

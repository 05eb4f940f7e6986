"""What is fetched from a bucket to read some columns of parts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from s3fs.core import S3File
from support.runs import RunContent, write_run
from support.s3 import S3Server

from pipeline.report.run import open_run
from pipeline.report.scan import scan_images
from pipeline.retrieval.parts import open_parquet
from pipeline.retrieval.store import FeatureStore
from pipeline.sinks.ledger import read_ledger


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each answer to a request for a range."""
    sizes: list[int] = []
    fetch: Callable[[object, int, int], bytes] = S3File._fetch_range

    def counted(file: object, start: int, end: int) -> bytes:
        data = fetch(file, start, end)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(S3File, "_fetch_range", counted)
    return sizes


def test_narrow_columns_are_read_without_the_vectors_between_them(
    tmp_path: Path, s3_server: S3Server, fetched: list[int]
) -> None:
    rng = np.random.default_rng(0)
    vectors = {name: rng.standard_normal((2000, 512), np.float32) for name in ("cls", "pooled")}
    run = write_run(tmp_path, RunContent(vectors, row_group_rows=500, failed={7: "Truncated", 1500: "Truncated"}))
    url = s3_server.upload(run, s3_server.make_bucket())
    stored = sum(path.stat().st_size for path in (run / "images").iterdir())
    store = FeatureStore.open(url, s3_server.storage_options)
    reads: dict[str, Callable[[], object]] = {
        "report": lambda: scan_images(open_run(url, s3_server.storage_options)).images,
        "addresses": lambda: store.uris(np.array([3, 1200])),
        "rows": lambda: [open_parquet(store.fs, part.path).read(["row"]) for part in store.parts],
        "ledger": lambda: read_ledger(url, s3_server.storage_options).images,
        "column": lambda: store.table(["format"]),
        "sql": lambda: store.sql("SELECT format, sha256, count(*) FROM images GROUP BY ALL"),
    }
    for name, read in reads.items():
        fetched.clear()
        read()
        assert 0 < sum(fetched) < stored / 2, name

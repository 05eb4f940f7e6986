"""Which files of a run its readers see: the same ones, as they are now, or an error that says why not."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from support.fleeting import fleeting
from support.gcs import GcsServer
from support.runs import RunContent, write_run
from support.s3 import S3Server

from pipeline.report.run import open_run
from pipeline.retrieval.store import FeatureStore
from pipeline.sinks import compaction
from pipeline.sinks.parts import list_parts
from pipeline.storage import filesystem
from schemas.errors import OutputError

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", RunContent({"cls": np.eye(6, dtype=np.float32)}, parts=3))


def test_the_same_parts_are_seen_by_all_who_read_a_run(run: Path) -> None:
    """One was put on another disk and linked, one is half written, and two are somebody's own notes."""
    first, second, third = sorted((run / "images").iterdir())
    os.link(third, run / "images" / f"_{third.name}")
    os.link(third, run / "images" / f".{third.name}")
    (run / "images" / "README.txt").touch()
    elsewhere = run.parent / second.name
    second.rename(elsewhere)
    second.symlink_to(elsewhere)
    names = [path.name for path in (first, second, third)]
    assert [part.name for part in list_parts(*filesystem(str(run), {}))] == names
    assert [part.name for part in FeatureStore.open(str(run)).parts] == names
    assert [path.rpartition("/")[2] for path in open_run(str(run), {}).parts("images")] == names


def test_listings_that_storage_options_keep_are_not_believed(run: Path, s3_server: S3Server) -> None:
    url = s3_server.upload(run, s3_server.make_bucket(), "a/run")
    kept = {"s3": {**s3_server.storage_options, "use_listings_cache": True}}
    seen = open_run(url, kept)
    assert len(seen.parts("images")) == 3
    assert compaction.compact(url, 1 << 30, {"s3": s3_server.storage_options}) == 3
    assert len(seen.parts("images")) == 1


class _Sftp(LocalFileSystem):  # type: ignore[misc]
    """Lists with the arguments that SFTP's driver takes."""

    def ls(self, path: str, detail: bool = False) -> Any:
        return super().ls(path, detail=detail)


def test_a_driver_that_keeps_no_listings_is_asked_for_none_anew(run: Path) -> None:
    assert len(list_parts(_Sftp(), str(run))) == 3


@pytest.mark.parametrize("denied", ["*images*", "*plan.json*"])
def test_a_store_that_does_not_let_parts_be_looked_for_is_named(
    run: Path, gcs_server: GcsServer, log_dir: Path, denied: str
) -> None:
    with fleeting(gcs_server, log_dir) as store:
        fs, out = filesystem(store.out, store.options)
        fs.put(str(run), out, recursive=True)
        seen = open_run(store.out, store.options)
        store.leave(denied)
        for look in (
            lambda: FeatureStore.open(store.out, store.options),
            lambda: seen.parts("images"),
        ):
            with pytest.raises(OutputError, match=rf"cannot read {out}/(images|_swap/plan\.json): .*credentials"):
                look()

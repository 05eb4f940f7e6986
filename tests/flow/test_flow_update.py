"""`--update` from listing to output: what is new or changed is done, what was replaced is gone, the rest stays."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.flaky_proxy import FlakyProxy
from support.s3 import S3Server

from pipeline import maintenance
from pipeline.flow import Connect, run
from pipeline.opening import open_directory, resolve_job
from pipeline.progress import Progress
from pipeline.sinks.parts import write_part
from schemas.errors import OutputError, SpecError
from schemas.spec import JobSpec, build_spec
from schemas.tables import FAILURES_SCHEMA

pytestmark = pytest.mark.slow


def spec_for(source: str, out: str, **values: Any) -> JobSpec:
    return build_spec({"sources": [source], "model": "null", "backend": "null", "out": out, **values})


def images_in(out: str, options: dict[str, Any]) -> dict[int, str]:
    """Names by row over all parts of images/; a row that stands twice is an error."""
    fs, path = fsspec.core.url_to_fs(out, **options)
    fs.invalidate_cache()
    pairs: list[tuple[int, str]] = []
    for name in fs.glob(f"{path}/images/*.parquet"):
        with fs.open(name, "rb") as file:
            table = pq.read_table(file, columns=["row", "uri"])
        pairs += zip(
            table["row"].to_pylist(), (uri.rpartition("/")[2] for uri in table["uri"].to_pylist()), strict=True
        )
    assert len(dict(pairs)) == len(pairs)
    return dict(sorted(pairs))


def test_an_update_does_what_is_new_and_drops_what_it_replaces(connect: Connect, s3_server: S3Server) -> None:
    """The output lies below the source, and is no input."""
    bucket, options = s3_server.make_bucket(), s3_server.storage_options
    source, out = f"s3://{bucket}/in", f"s3://{bucket}/in/out"
    fs, folder = fsspec.core.url_to_fs(source, **options)

    def put(name: str, data: str) -> None:
        fs.pipe_file(f"{folder}/{name}", data.encode())

    by_scheme = {"s3": options}
    spec = spec_for(source, out, storage_options=by_scheme)
    names = [f"{number:02d}.jpg" for number in range(20)]
    for name in names:
        put(name, name)
    run(spec, connect)
    assert images_in(out, options) == dict(enumerate(names))

    update = spec_for(source, out, storage_options=by_scheme, update=True)
    assert run(update, connect).attempt.rows_planned == 0

    put("03.jpg", "larger than before")
    put("07.jpg", "70.jpg")  # as large as before
    put("00-new.jpg", "new")
    put("new.jpg", "new")
    fs.rm_file(f"{folder}/19.jpg")
    summary = run(update, connect)
    assert summary.attempt.rows_planned == 4
    assert (summary.rows, summary.images, summary.failures) == (22, 22, 0), "rows that were replaced are no images"
    found = images_in(out, options)
    kept = {row: name for row, name in enumerate(names) if row not in {3, 7}}
    assert {row: name for row, name in found.items() if row < 20} == kept
    assert Counter(name for row, name in found.items() if row >= 20) == Counter(
        ["03.jpg", "07.jpg", "00-new.jpg", "new.jpg"]
    )
    assert sorted(found)[-4:] == [20, 21, 22, 23]
    verified = maintenance.verify(out, by_scheme)
    assert (verified.problems, verified.images, verified.pending) == ([], 22, 0)

    put("03.jpg", "and again")
    assert run(update, connect).attempt.rows_planned == 1
    assert images_in(out, options).get(24) == "03.jpg"
    assert Counter(images_in(out, options).values())["03.jpg"] == 1
    assert run(spec, connect).attempt.rows_planned == 0
    assert maintenance.verify(out, by_scheme).problems == []


def test_an_update_counts_no_rows_that_it_replaces(tmp_path: Path, connect: Connect) -> None:
    source, out = tmp_path / "in", str(tmp_path / "out")
    source.mkdir()
    for number in range(10):
        (source / f"{number}.jpg").write_bytes(b"x")
    spec = spec_for(str(source), out)
    failure = {"uri": "x", "stage": "decode", "error": "Truncated", "message": "", "attempts": 1, "retryable": False}
    failures = pa.Table.from_pylist([{"row": row, **failure} for row in range(4)], FAILURES_SCHEMA)
    metadata = open_directory(resolve_job(spec)).record.part_metadata()
    write_part(fsspec.filesystem("file"), out, "failures", failures, metadata)
    assert run(spec, connect).failures == 4
    for number in range(3):
        (source / f"{number}.jpg").write_bytes(b"changed")
    seen: list[Progress] = []
    summary = run(spec_for(str(source), out, update=True), connect, seen.append)
    counted = [(look.done, look.committed, look.total, look.failures) for look in seen if look.total]
    assert counted[0] == (7, 7, 10, 1)
    assert counted[-1] == (10, 10, 10, 1)
    assert (summary.rows, summary.images, summary.failures) == (10, 9, 1)


def test_an_update_of_a_new_directory_lists_the_sources_once(
    tmp_path: Path, s3_server: S3Server, flaky_proxy: Callable[..., FlakyProxy[Any]]
) -> None:
    proxy = flaky_proxy(s3_server)
    bucket = s3_server.make_bucket()
    fs, folder = fsspec.core.url_to_fs(f"s3://{bucket}/in", **s3_server.storage_options)
    for number in range(3):
        fs.pipe_file(f"{folder}/{number}.jpg", b"x")
    requests = []
    for update in (False, True, True):
        out = str(tmp_path / ("updated" if update else "plain"))
        options = {"s3": proxy.server.storage_options}
        proxy.control.forget()
        opened = open_directory(resolve_job(spec_for(f"s3://{bucket}/in", out, storage_options=options, update=update)))
        assert opened.record.manifest_rows == 3
        requests.append(proxy.control.requests())
    assert requests[0] > 0
    assert requests == [requests[0]] * 3


def test_an_update_by_one_of_several_shards_is_refused(tmp_path: Path, connect: Connect) -> None:
    """Each would cut another manifest: a row between two cuts would be done by nobody, or by both."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.jpg").write_bytes(b"x")
    update = spec_for(str(tmp_path / "in"), str(tmp_path / "out"), update=True, shard={"index": 0, "count": 2})
    with pytest.raises(SpecError, match="--update with --shard"):
        run(update, connect)


def test_an_update_that_was_cut_short_is_finished_by_the_next(
    tmp_path: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "in", str(tmp_path / "out")
    source.mkdir()
    for number in range(5):
        (source / f"{number}.jpg").write_bytes(b"x")
    run(spec_for(str(source), out), connect)
    (source / "1.jpg").write_bytes(b"changed")
    (source / "9.jpg").write_bytes(b"new")
    update = spec_for(str(source), out, update=True)

    def broken() -> Any:
        raise OutputError("the cluster is gone")

    with pytest.raises(OutputError, match="the cluster is gone"):
        run(update, broken)
    assert images_in(out, {}) == {number: f"{number}.jpg" for number in range(5)}
    assert run(update, connect).attempt.rows_planned == 2
    assert sorted(images_in(out, {}).values()) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "9.jpg"]
    assert maintenance.verify(out, {}).problems == []


def test_a_table_that_gains_a_column_needs_another_output(tmp_path: Path, connect: Connect) -> None:
    table, out = tmp_path / "t.csv", str(tmp_path / "out")
    table.write_text("uri,n\n/a.jpg,1\n")
    run(spec_for(str(table), out), connect)
    table.write_text("uri,n,more\n/a.jpg,1,x\n/b.jpg,2,y\n")
    update = spec_for(str(table), out, update=True)
    with pytest.raises(OutputError, match=r"now carry columns \(more\)"):
        run(update, connect)
    table.write_text("uri\n/a.jpg\n/b.jpg\n")
    assert run(update, connect).attempt.rows_planned == 1
    assert images_in(out, {}) == {0: "a.jpg", 1: "b.jpg"}
    files = list((tmp_path / "out/manifest").iterdir())
    assert len(files) == 2

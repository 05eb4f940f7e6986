"""What runs leave below a source is no list of images, whichever run left it and by whatever path it is named."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.s3 import S3Server
from support.source_rows import read, rows_of, spec_of, tree

from pipeline.sources.manifest import write_manifest
from schemas.errors import SpecError


@pytest.mark.parametrize("by", ["this version", "an earlier one"])
def test_the_manifest_of_another_run_is_no_table_of_addresses(tmp_path: Path, by: str) -> None:
    photos = tree(tmp_path / "photos", ["1.jpg", "2.jpg"])
    (part,) = write_manifest([read(photos)], str(photos / "A"), {})
    place = photos / "A" / "manifest" / part.name
    if by == "an earlier one":
        pq.write_table(pq.read_table(place).replace_schema_metadata(None), place)
    assert rows_of(spec_of(photos, out=str(photos / "B"))) == [f"{photos}/1.jpg", f"{photos}/2.jpg", str(place)]
    assert rows_of(spec_of(place, out=str(photos / "B"))) == [f"{photos}/1.jpg", f"{photos}/2.jpg"]


def test_what_a_user_makes_of_a_runs_table_is_a_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """pyarrow carries the metadata of a file over to what is written of it."""
    photos, lists = tree(tmp_path / "photos", ["1.jpg", "2.jpg"]), tree(tmp_path / "lists", ["0.jpg"])
    (part,) = write_manifest([read(photos)], str(tmp_path / "A"), {})
    rows = pq.read_table(tmp_path / "A" / "manifest" / part.name)
    assert rows.schema.metadata
    pq.write_table(rows.select(["uri"]).append_column("label", [["cat", "dog"]]), lists / "labels.parquet")
    assert rows_of(spec_of(lists)) == [f"{lists}/0.jpg", f"{photos}/1.jpg", f"{photos}/2.jpg"]
    assert "left out" not in caplog.text
    pq.write_table(rows.slice(1), lists / "second.parquet")
    assert rows_of(spec_of(lists))[3:] == [f"{lists}/second.parquet"]
    assert f"{lists}/second.parquet begins with the columns of what a run writes" in caplog.text
    assert "To take them give the file itself as a source" in caplog.text
    assert rows_of(spec_of(lists / "second.parquet")) == [f"{photos}/2.jpg"]


def test_an_output_below_a_source_that_is_a_link_is_no_input(tmp_path: Path) -> None:
    real = tree(tmp_path / "disk" / "photos", ["1.jpg", "out/images/part.parquet", "outer/2.jpg"])
    link = tmp_path / "photos"
    link.symlink_to(real)
    for source, out in ((link, real / "out"), (real, link / "out")):
        assert rows_of(spec_of(source, out=str(out))) == [f"{source}/1.jpg", f"{source}/outer/2.jpg"]
    (real / "outer" / "back").symlink_to(real / "out")
    assert rows_of(spec_of(link, out=str(link / "out"))) == [f"{link}/1.jpg", f"{link}/outer/2.jpg"]
    for source in (link / "out", real / "outer" / "back"):
        with pytest.raises(SpecError, match="lies in --out"):
            rows_of(spec_of(source, out=str(real / "out")))


@pytest.mark.parametrize("cache", ["simplecache", "filecache", "simplecache::blockcache"])
def test_an_output_behind_a_cache_is_no_input(tmp_path: Path, s3_server: S3Server, cache: str) -> None:
    real = tree(tmp_path / "in", ["a.jpg", "out/run.json", "outer/b.jpg"])
    base = s3_server.upload(real, s3_server.make_bucket(), "in")
    (tmp_path / "link").symlink_to(real)
    for folder, out in ((base, f"{base}/out"), (f"file://{real}", str(tmp_path / "link" / "out"))):
        options = s3_server.storage_options if folder == base else {}
        rows = rows_of(spec_of(f"{cache}::{folder}", out=out, storage_options=options))
        assert rows == [f"{cache}::{folder}/a.jpg", f"{cache}::{folder}/outer/b.jpg"]
        with pytest.raises(SpecError, match=r"out lies in --out"):
            rows_of(spec_of(f"{cache}::{folder}/out", out=out, storage_options=options))

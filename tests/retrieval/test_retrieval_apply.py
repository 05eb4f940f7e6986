"""`apply` begun before, cut short, or done before the run got more pictures."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.runs import RunContent, clustered, write_run

from pipeline.maintenance import reopen_failures, verify
from pipeline.retrieval import apply
from pipeline.retrieval.apply import apply_head
from pipeline.retrieval.head import HeadRecord, save_head
from pipeline.retrieval.logistic import Linear
from pipeline.retrieval.store import FeatureStore
from schemas.errors import OutputError

VECTORS = clustered(70, 8, 2, spread=0.3)
ADDED = "manifest-000000000060-000000000070.parquet"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = write_run(tmp_path / "run", RunContent({"cls": VECTORS[:60]}))
    add_head(run, 8)
    return run


def add_head(run: Path, dim: int) -> None:
    store = FeatureStore.open(str(run))
    record = HeadRecord(
        name="main", feature="cls", dim=dim, labels=["a", "b"], model=store.record.model, run_id=store.record.run_id,
        label_source="", strength=0.1, seed=0, training_rows=10, accuracy=0.5,
    )  # fmt: skip
    save_head(store, f"{run}/probes/main", Linear(np.eye(2, dim, dtype=np.float32), np.zeros(2, np.float32)), record)


def label(run: Path, out: Path) -> list[int]:
    apply_head(FeatureStore.open(str(run)), "main", str(out))
    assert not verify(str(out), {}).problems
    return FeatureStore.open(str(out)).rows().tolist()


def add_rows(run: Path) -> None:
    """What `embed --update` leaves: a part more of the manifest, named in the record, and parts of images."""
    first = json.loads((run / "run.json").read_text())["manifest_parts"]
    (old,) = (run / "manifest").iterdir()
    frozen = old.read_bytes()
    for part in (run / "images").iterdir():
        part.unlink()
    write_run(run, RunContent({"cls": VECTORS}))
    (new,) = (path for path in (run / "manifest").iterdir() if path != old)
    pq.write_table(pq.read_table(new).slice(60), run / "manifest" / ADDED)
    new.unlink()
    old.write_bytes(frozen)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "manifest_parts": [*first, ADDED]}))


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_goes_on_where_the_record_was_not_written_yet(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(apply, "put_bytes", interrupt)
        with pytest.raises(KeyboardInterrupt):
            label(run, out)
    assert [path.name for path in out.iterdir()] == ["manifest"]
    assert label(run, out) == list(range(60))


@pytest.mark.parametrize("foreign", ["notes.txt", "manifest/notes.parquet"])
def test_what_is_not_ours_is_refused(run: Path, tmp_path: Path, foreign: str) -> None:
    (tmp_path / "out" / "manifest").mkdir(parents=True)
    (tmp_path / "out" / foreign).write_text("mine")
    with pytest.raises(OutputError, match="is not empty and no run's directory"):
        label(run, tmp_path / "out")


def test_a_manifest_of_another_run_is_refused(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", RunContent({"cls": VECTORS[:60]}, uris=[f"{row}.png" for row in range(60)]))
    for path in [other / "run.json", *other.glob("images/*")]:
        path.unlink()
    for folder in ("images", "failures"):
        (other / folder).rmdir()
    with pytest.raises(OutputError, match="is not empty and no run's directory"):
        label(run, other)


def test_follows_a_run_that_was_updated(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert label(run, out) == list(range(60))
    stamps = {path: path.stat().st_mtime_ns for path in (out / "manifest").iterdir()}
    add_rows(run)
    with monkeypatch.context() as patched:
        patched.setattr(apply, "put_bytes", interrupt)
        with pytest.raises(KeyboardInterrupt):
            label(run, out)
    assert label(run, out) == list(range(70))
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps, "what was right was copied again"
    assert json.loads((out / "run.json").read_text())["manifest_rows"] == 70


def test_a_run_with_less_than_was_labelled_is_another(run: Path, tmp_path: Path) -> None:
    before = (run / "run.json").read_text()
    add_rows(run)
    assert len(label(run, tmp_path / "out")) == 70
    (run / "run.json").write_text(before)
    with pytest.raises(OutputError, match=r"holds another result:[\s\S]*manifest_parts"):
        label(run, tmp_path / "out")


def test_the_record_says_where_the_labels_come_from(run: Path, tmp_path: Path) -> None:
    """Also where the run had labels of its own: by words, from a file, by another head."""
    before = json.loads((run / "run.json").read_text())
    before["spec"] |= {"zero_shot": ["a cat", "a dog"], "templates": ["{}"], "label_file": "/l.txt", "head": "/other"}
    before["model"] |= {"zero_shot": "1" * 64, "label_digest": "2" * 64, "head": "3" * 64, "multi_label": True}
    (run / "run.json").write_text(json.dumps(before))
    label(run, tmp_path / "out")
    after = json.loads((tmp_path / "out" / "run.json").read_text())
    digest = hashlib.sha256((run / "probes" / "main" / "head.safetensors").read_bytes()).hexdigest()
    assert after["model"] == before["model"] | {
        "num_labels": 2, "multi_label": False, "zero_shot": None, "label_digest": None, "head": digest,
    }  # fmt: skip
    for name in ("zero_shot", "templates", "vocabulary", "label_file", "head"):
        assert after["spec"][name] is None
    assert (after["spec"]["labels"], after["spec"]["features"]) == (1, [])
    assert after["applied"] == {
        "probe": "main", "digest": digest, "feature": "cls", "trained_on": before["run_id"], "run_id": before["run_id"],
    }  # fmt: skip
    (part, *_) = (tmp_path / "out" / "images").iterdir()
    assert json.loads(pq.read_schema(part).metadata[b"patchstream"])["applied"] == after["applied"]


def test_failures_are_retried_where_they_happened(run: Path, tmp_path: Path) -> None:
    label(run, tmp_path / "out")
    with pytest.raises(OutputError, match=r"`apply`[\s\S]*retry that run, then `patchstream apply DIR --probe main"):
        reopen_failures(str(tmp_path / "out"), True, {})


def test_parts_are_written_as_those_of_a_run(tmp_path: Path) -> None:
    """In row groups that a reader of one row can afford, and with checksums that tell damage."""
    content = RunContent({"cls": clustered(20_000, 2, 2)}, failed={7: "Truncated"}, parts=1)
    run, out = write_run(tmp_path / "run", content), tmp_path / "out"
    add_head(run, 2)
    label(run, out)
    (part,) = (out / "images").iterdir()
    metadata = pq.read_metadata(part)
    assert [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)] == [1 << 14, 3616]
    for folder in ("images", "failures"):
        (part,) = (out / folder).iterdir()
        group = pq.read_metadata(part).row_group(0)
        chunk = next(found for found in map(group.column, range(group.num_columns)) if found.path_in_schema == "uri")
        data = bytearray(part.read_bytes())
        data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
        part.write_bytes(data)
        assert "checksum" in str(verify(str(out), {}).problems)

"""Patch features and visual tokens through the whole job, and how other tools read them."""

from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from support.checkpoints import make_checkpoint
from support.commands import table

from pipeline import maintenance
from pipeline.flow import Connect, run
from pipeline.images.decode import DecodeSpec, decode_into
from pipeline.images.formats import prepare_process
from pipeline.models import inspect_model, load_model
from schemas.spec import build_spec

pytestmark = pytest.mark.slow

PATCHES, WIDTH = 196, 96


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, connect: Connect, pictures: Path) -> tuple[Path, Path]:
    """A run with every kind of feature, in several parts that were compacted, and its checkpoint."""
    model = make_checkpoint(tmp_path_factory.mktemp("beit") / "beit", "beit-mim")
    out = tmp_path_factory.mktemp("patches") / "o"
    spec = build_spec(
        {
            "sources": [str(pictures)],
            "model": str(model),
            "out": str(out),
            "dtype": "float32",
            "features": ["visual_tokens", "patches", "cls"],
            "sink": {"commit_s": 0.5, "part_bytes": 1 << 18, "compact_bytes": 4 << 20},
        }
    )
    summary = run(spec, connect)
    assert summary.images + summary.failures == summary.rows
    assert summary.images > 90
    assert summary.failures > 0
    return out, model


def pixels_of(uri: str, model: Path) -> torch.Tensor:
    info = inspect_model(str(model))
    out = np.empty((*info.image_size, 3), np.uint8)
    decode_into(Path(uri).read_bytes(), out, DecodeSpec(info.preprocessing, "exact", 1 << 30))
    return torch.from_numpy(out)[None]


def test_rows_hold_what_the_model_gives(finished: tuple[Path, Path]) -> None:
    out, path = finished
    prepare_process()
    model = load_model(inspect_model(str(path)))
    written = table(out)
    for position in range(0, written.num_rows, 17):
        row = written.slice(position, 1).to_pylist()[0]
        expected = model(pixels_of(row["uri"], path), ["patches", "visual_tokens"])
        assert expected.patches is not None
        assert expected.visual_tokens is not None
        patches = np.array(row["patches"], np.float32)
        assert patches.shape == (PATCHES, WIDTH)
        np.testing.assert_allclose(patches, expected.patches[0].float().numpy(), rtol=1e-3, atol=1e-3)
        assert np.mean(np.array(row["visual_tokens"]) == expected.visual_tokens[0].numpy()) > 0.99


def test_a_size_that_is_not_square(
    tmp_path: Path, connect: Connect, pictures: Path, finished: tuple[Path, Path]
) -> None:
    _, path = finished
    values = {"sources": [str(pictures)], "model": str(path), "limit": 3, "features": ["pooled", "visual_tokens"]}
    values |= {"out": str(tmp_path / "o"), "image_size": "160x224", "dtype": "float32"}
    run(build_spec(values), connect)
    prepare_process()
    info = inspect_model(str(path), image_size=(160, 224))
    model = load_model(info)
    written = table(tmp_path / "o").to_pylist()
    assert written
    for row in written:
        pixels = np.empty((160, 224, 3), np.uint8)
        decode_into(Path(row["uri"]).read_bytes(), pixels, DecodeSpec(info.preprocessing, "exact", 1 << 30))
        expected = model(torch.from_numpy(pixels)[None], ["visual_tokens"])
        assert expected.pooled is not None
        assert expected.visual_tokens is not None
        np.testing.assert_allclose(row["pooled"], expected.pooled[0].numpy(), atol=1e-4)
        assert len(row["visual_tokens"]) == 10 * 14
        assert np.mean(np.array(row["visual_tokens"]) == expected.visual_tokens[0].numpy()) > 0.98
    assert maintenance.verify(str(tmp_path / "o"), {}).problems == []


def test_the_directory_verifies_and_its_files_stay_small(finished: tuple[Path, Path]) -> None:
    out, _ = finished
    assert maintenance.verify(str(out), {}).problems == []
    files = sorted((out / "images").glob("*.parquet"))
    # 97 rows of about 38 kB in parts that aim at 4 MiB.
    assert all(file.stat().st_size < 8 << 20 for file in files)
    assert not set(pq.read_schema(next((out / "failures").glob("*.parquet"))).names) & {"patches", "visual_tokens"}


def test_duckdb_pandas_and_arrow_read_them(finished: tuple[Path, Path]) -> None:
    out, _ = finished
    exact = table(out, "images")
    rows = exact.num_rows
    patches = exact["patches"].combine_chunks().flatten().flatten().to_numpy().reshape(rows, PATCHES, WIDTH)
    assert patches.dtype == np.float16
    frame = pd.read_parquet(out / "images").sort_values("row")
    np.testing.assert_array_equal(np.stack(frame["patches"].iloc[3]), patches[3])
    np.testing.assert_array_equal(frame["visual_tokens"].iloc[3], exact["visual_tokens"][3].as_py())
    glob = f"'{out}/images/*.parquet'"
    query = f"select patches[5][7], visual_tokens[196] from {glob} order by row limit 1 offset 3"
    (answer,) = duckdb.sql(query).fetchall()
    assert answer == (float(patches[3, 4, 6]), exact["visual_tokens"][3].as_py()[195])
    ((counted,),) = duckdb.sql(f"select count(*) from (select unnest(patches) from {glob})").fetchall()
    assert counted == rows * PATCHES


def test_searching_such_a_run_uses_its_vectors(finished: tuple[Path, Path]) -> None:
    from pipeline.retrieval.store import FeatureStore

    store = FeatureStore.open(str(finished[0]))
    assert store.features == {"cls": WIDTH}
    assert store.matrix("cls").shape[1] == WIDTH

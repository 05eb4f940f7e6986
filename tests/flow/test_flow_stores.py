"""The same pictures from and to S3, Google Cloud Storage and a web server that fail as real ones do: the same rows."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from support.checkpoints import make_checkpoint
from support.commands import table
from support.faults import Rule, throttled
from support.flaky_proxy import FlakyProxy
from support.gcs import GcsServer
from support.http_server import HttpServer
from support.s3 import S3Server
from support.testdata import TESTDATA, photos, trained_vit

from pipeline import maintenance
from pipeline.flow import Connect, Summary, run
from schemas.spec import JobSpec, build_spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

StartProxy = Callable[..., FlakyProxy[Any]]
COUNT = 60
SIGNATURE = "s1gn4ture-of-nobody"
S3_SECRET = "not-a-secret"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Photographs where there are any, drawn pictures elsewhere."""
    if TESTDATA.is_dir():
        return photos(COUNT)
    from jobs.demo.draw import write_pictures

    folder = tmp_path_factory.mktemp("drawn")
    write_pictures(folder, COUNT, seed=5)
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained ViT-Ti, or a small random one."""
    return trained_vit() if TESTDATA.is_dir() else make_checkpoint(tmp_path_factory.mktemp("model") / "vit", "vit")


def spec_for(sources: list[str], model: Path, out: str, **values: Any) -> JobSpec:
    base = {"features": ["cls"], "dtype": "float32", "batch_size": 8, "sink": {"commit_s": 1.0}}
    return build_spec({"sources": sources, "model": str(model), "out": out, **base, **values})


def features_of(rows: pa.Table) -> dict[str, np.ndarray]:
    """CLS vectors by the SHA-256 of the picture's file."""
    return dict(zip(rows["sha256"].to_pylist(), np.array(rows["cls"].to_pylist()), strict=True))


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, images: list[Path], model: Path, connect: Connect
) -> dict[str, np.ndarray]:
    """What the job gives on this machine's own disk."""
    folder, out = tmp_path_factory.mktemp("local"), tmp_path_factory.mktemp("reference") / "out"
    for path in images:
        (folder / path.name).symlink_to(path)
    summary = run(spec_for([str(folder)], model, str(out)), connect)
    assert (summary.images, summary.failures) == (COUNT, 0)
    return features_of(table(out))


def read_back(out: str, options: Mapping[str, Any], folder: str = "images") -> pa.Table:
    """All rows of a folder of a run in a store, as a plain glob sees them."""
    fs, path = fsspec.core.url_to_fs(out, **options, use_listings_cache=False)
    tables = [pq.read_table(io.BytesIO(fs.cat_file(name))) for name in sorted(fs.glob(f"{path}/{folder}/*.parquet"))]
    return pa.concat_tables(tables).sort_by("row") if tables else pa.table({"row": pa.array([], pa.int64())})


def assert_exact(summary: Summary, out: str, options: Mapping[str, Any], by_scheme: Mapping[str, Any]) -> pa.Table:
    """Every row is in exactly one place, and `verify` agrees. Returns the images."""
    done, failed = read_back(out, options), read_back(out, options, "failures")
    assert sorted(done["row"].to_pylist() + failed["row"].to_pylist()) == list(range(summary.rows))
    assert (len(done), len(failed)) == (summary.images, summary.failures)
    assert maintenance.verify(out, by_scheme).problems == []
    return done


def assert_same_features(rows: pa.Table, expected: Mapping[str, np.ndarray], images: list[Path]) -> None:
    found = features_of(rows)
    assert len(found) == len(rows) == len(images)
    for digest, vector in found.items():
        assert np.abs(vector - expected[digest]).max() <= 1e-5 * max(1.0, float(np.abs(expected[digest]).max()))


def shard_of(files: list[Path], path: Path) -> None:
    with tarfile.open(path, "w") as shard:
        for number, file in enumerate(files):
            for suffix, data in (("jpg", file.read_bytes()), ("json", json.dumps({"n": number}).encode())):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))


def link(files: list[Path], folder: Path) -> Path:
    folder.mkdir(parents=True)
    for path in files:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


# Each object is spoilt at most once by each rule, so that the four tries that an image has are enough.
FAULTS = (
    Rule("status", path="*/plain/*", methods=("GET",), status=503, first=1, rate=0.4),
    Rule("reset", path="*/plain/*", methods=("GET",), first=1, rate=0.3, after_bytes=2000),
    Rule("truncate", path="*/plain/*", methods=("GET",), first=1, rate=0.4, after_bytes=3000),
    Rule("status", path="*/shards/*", methods=("GET",), status=500, first=1),
    Rule("truncate", path="*/table/*", methods=("GET",), first=1, after_bytes=100),
    Rule("status", path="*images/part*", methods=("PUT", "POST"), status=503, first=1),
    Rule("reset", path="*failures/part*", methods=("PUT", "POST"), first=1, forward=True),
)


def test_one_job_from_every_store_to_s3_while_they_fail(
    tmp_path: Path, images: list[Path], model: Path, expected: dict[str, np.ndarray], connect: Connect,
    s3_server: S3Server, gcs_server: GcsServer, http_server: Callable[..., HttpServer], flaky_proxy: StartProxy,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    plain, tarred, bytes_of, google, web = (images[start::5] for start in range(5))
    for number in range(2):
        (tmp_path / "s3/shards").mkdir(parents=True, exist_ok=True)
        shard_of(tarred[number::2], tmp_path / f"s3/shards/{number}.tar")
    link(plain, tmp_path / "s3/plain")
    (tmp_path / "s3/table").mkdir()
    values = [{"bytes": path.read_bytes(), "path": path.name} for path in bytes_of]
    pq.write_table(pa.table({"image": values, "n": range(len(values))}), tmp_path / "s3/table/t.parquet")
    base = s3_server.upload(tmp_path / "s3", s3_server.make_bucket())
    google_base = gcs_server.upload(link(google, tmp_path / "gs"), gcs_server.make_bucket("faults-in-one-job"), "plain")
    server = http_server(
        link(web, tmp_path / "web"),
        [
            Rule("status", path="/forbidden.jpg", status=403),
            throttled(0, path="/*.JPEG", first=1, rate=0.3),
            Rule("slow", path=f"/{web[0].name}", bytes_per_s=300_000),
            Rule("cut", path="/cut.jpg", after_bytes=1500),
            Rule("truncate", path="/*", methods=("GET",), first=1, rate=0.4, after_bytes=900),
        ],
    )
    (tmp_path / "web/cut.jpg").write_bytes(web[0].read_bytes())
    names = [*(path.name for path in web), "missing.jpg", "forbidden.jpg", "cut.jpg"]
    lines = [f"{server.url_of(name)}?X-Amz-Signature={SIGNATURE}&v={place},{place}" for place, name in enumerate(names)]
    (tmp_path / "list.csv").write_text("\n".join(["uri,n", *lines]) + "\n")
    s3, gs = flaky_proxy(s3_server, FAULTS, seed=3), flaky_proxy(gcs_server, FAULTS, seed=4)
    options = {"s3": s3.server.storage_options, "gs": gs.server.storage_options}
    out = f"s3://{s3_server.make_bucket()}/results"
    sources = [f"{base}/plain", f"{base}/shards/*.tar", f"{base}/table/t.parquet", google_base]
    summary = run(spec_for([*sources, str(tmp_path / "list.csv")], model, out, storage_options=options), connect)

    assert (summary.images, summary.failures) == (COUNT, 3)
    done = assert_exact(summary, out, s3_server.storage_options, {"s3": s3_server.storage_options})
    assert_same_features(done, expected, images)
    failed = read_back(out, s3_server.storage_options, "failures").to_pylist()
    assert {row["uri"].rpartition("/")[2].partition("?")[0]: (row["stage"], row["attempts"]) for row in failed} == {
        "missing.jpg": ("fetch", 1), "forbidden.jpg": ("fetch", 1), "cut.jpg": ("decode", 1)
    }  # fmt: skip
    assert {row["error"] for row in failed} >= {"NotFound", "Forbidden"}
    assert not any(row["retryable"] for row in failed)
    assert [server.control.requests(f"/{name}") for name in ("missing.jpg", "forbidden.jpg", "cut.jpg")] == [1, 1, 1]
    for control in (s3.control, gs.control, server.control):
        assert control.faults(["status", "reset"]) > 0
        assert control.faults(["truncate"]) > 0
    _assert_columns(done)
    _assert_few_requests(s3, len(tarred))
    _assert_no_secrets(out, s3_server, capfd.readouterr())


def _assert_columns(done: pa.Table) -> None:
    """Sidecars and the columns of tables rode along."""
    for row in done.to_pylist():
        of_shard = ".tar#" in row["uri"]
        assert (row["json"] is not None) == of_shard
        assert (row["n"] is not None) == (row["uri"].startswith("http") or ".parquet#" in row["uri"])


def _assert_few_requests(s3: FlakyProxy[Any], members: int) -> None:
    """Members of a shard are fetched together: far fewer requests than members, listing and the faults included."""
    ranges = Counter(target for _, target, byte_range, _ in s3.control.stats()["log"] if byte_range is not None)
    of_shards = sum(count for target, count in ranges.items() if ".tar" in target)
    assert 4 <= of_shards < 1.2 * members


def _assert_no_secrets(out: str, server: S3Server, captured: tuple[str, str]) -> None:
    """Neither the signature nor the secret key stands in the output, in what was printed or in Ray's logs.

    The manifest keeps the addresses whole: nothing could be fetched without.
    """
    fs, path = fsspec.core.url_to_fs(out, **server.storage_options, use_listings_cache=False)
    objects = {name: fs.cat_file(name) for name in fs.find(path)}
    assert {name.removeprefix(f"{path}/").partition("/")[0] for name in objects} >= {
        *("run.json", "manifest", "images", "failures", "attempts")
    }
    for name, data in objects.items():
        assert S3_SECRET.encode() not in data, name
        assert SIGNATURE.encode() not in data or "/manifest/" in name, name
        if name.endswith(".parquet") and "/manifest/" not in name:
            parquet = pq.read_table(io.BytesIO(data))
            assert SIGNATURE not in f"{parquet.schema.metadata}{parquet.to_pydict()}", name
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    texts = {str(file): file.read_text(errors="replace") for file in logs.rglob("*") if file.is_file()}
    for name, text in {**texts, "stdout": captured[0], "stderr": captured[1]}.items():
        assert SIGNATURE not in text, name
        assert S3_SECRET not in text, name


def test_from_google_cloud_storage_to_it(
    tmp_path: Path, images: list[Path], model: Path, expected: dict[str, np.ndarray], connect: Connect,
    gcs_server: GcsServer, flaky_proxy: StartProxy,
) -> None:  # fmt: skip
    some = images[:16]
    (tmp_path / "in/shards").mkdir(parents=True)
    shard_of(some[8:], tmp_path / "in/shards/x.tar")
    link(some[:8], tmp_path / "in/plain")
    # Faults are drawn from addresses: under a new name each time, fewer pictures might meet one.
    bucket = gcs_server.make_bucket("faults-on-the-way")
    base = gcs_server.upload(tmp_path / "in", bucket, "in")
    proxy = flaky_proxy(gcs_server, FAULTS, seed=7)
    options, out = {"gs": proxy.server.storage_options}, f"gs://{bucket}/out"
    summary = run(spec_for([base], model, out, storage_options=options), connect)
    assert (summary.images, summary.failures) == (16, 0)
    done = assert_exact(summary, out, gcs_server.storage_options, {"gs": gcs_server.storage_options})
    assert_same_features(done, expected, some)
    assert proxy.control.faults() > 5

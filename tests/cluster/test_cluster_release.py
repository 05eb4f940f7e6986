"""Every node runs the code that the driver runs, or the job says which does not before its first row."""

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from support.checkpoints import make_checkpoint
from support.commands import PATCHSTREAM

from cluster.nodes import LocalCluster, NodeSize, local_cluster
from pipeline.decoding import DecodeJob, decode_rows
from pipeline.images.stage import Reading
from pipeline.sources.manifest import ManifestPart
from schemas.errors import ClusterError, OutputError
from schemas.preprocessing import Preprocessing
from schemas.release import PACKAGES, VERSION, check_release, release

ROOT = Path(__file__).parents[2]


def test_the_version_is_that_of_the_distribution() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == VERSION
    assert release().version == VERSION
    assert release().home == str(ROOT)


def test_other_code_is_refused_by_the_worker_that_has_it() -> None:
    check_release(release()._replace(home="/elsewhere", host="another"))
    for change in ({"version": "0.0.1"}, {"digest": "0" * 64}):
        with pytest.raises(ClusterError, match=r"a worker on \S+ has patchstream .*, the driver on"):
            check_release(release()._replace(**change))


def copied(folder: Path) -> Path:
    """The packages in another place, as a node has them that somebody forgot to upgrade."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def head() -> Iterator[LocalCluster]:
    """A head alone, which every test adds one node to."""
    where = {"PYTHONPATH": str(ROOT)}
    with local_cluster((), head=NodeSize(cpus=0, store_bytes=100 << 20), environment=where) as cluster:
        yield cluster


def refused(
    cluster: LocalCluster,
    tmp_path: Path,
    path: Path,
    extra: dict[str, str] | None = None,
    *,
    source: Path = ROOT / "docs",
    out: Path | None = None,
) -> str:
    """Standard error of a job on `cluster` and one more node that imports from `path`; it must end with code 2."""
    (node,) = cluster.join(NodeSize(store_bytes=100 << 20), environment={"PYTHONPATH": str(path)})
    try:
        arguments = ("embed", source, "--backend", "null", "--out", out or tmp_path / "out")
        # From an empty folder: Ray lets workers import what lies in the folder that the driver was started in.
        done = subprocess.run(
            [*PATCHSTREAM, *map(str, arguments)],
            env={**os.environ, **cluster.variables, "PYTHONPATH": str(ROOT), **(extra or {})},
            cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
    finally:
        node.stop()
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("images/*"))
    return str(done.stderr)


@pytest.mark.slow
def test_a_node_with_another_version(head: LocalCluster, tmp_path: Path) -> None:
    old = copied(tmp_path / "old")
    text = (old / "schemas/release.py").read_text()
    (old / "schemas/release.py").write_text(text.replace(f'VERSION = "{VERSION}"', 'VERSION = "0.0.9"'))
    shown = refused(head, tmp_path, old)
    assert re.search(r"1 of 2 nodes cannot work on this job:\n  node \w+ on \S+: has patchstream 0\.0\.9", shown)
    assert f"has patchstream {VERSION}" in shown


@pytest.mark.slow
def test_a_node_that_cannot_import_the_package(head: LocalCluster, tmp_path: Path) -> None:
    broken = copied(tmp_path / "broken")
    (broken / "pipeline/__init__.py").write_text("import numpi\n")
    shown = refused(head, tmp_path, broken)
    assert "cannot import patchstream (ModuleNotFoundError: No module named 'numpi')" in shown


@pytest.mark.slow
@pytest.mark.parametrize("command", ["benchmark", "embed"])
def test_nothing_begins_where_no_node_takes_tasks(head: LocalCluster, tmp_path: Path, command: str) -> None:
    """As on a cluster that has yet to grow."""
    model = make_checkpoint(tmp_path / "vit", "vit", image_size=32, hidden_size=64, num_attention_heads=2)
    (tmp_path / "photos.csv").write_text(f"uri\n{tmp_path / 'none.jpg'}\n")
    out = ("--out", str(tmp_path / "out")) if command == "embed" else ()
    done = subprocess.run(
        [*PATCHSTREAM, command, str(tmp_path / "photos.csv"), "--model", str(model), *out],
        env={**os.environ, **head.variables, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "no node of the cluster takes tasks yet" in done.stderr


@pytest.mark.slow
def test_a_variable_that_a_node_does_not_have(head: LocalCluster, tmp_path: Path) -> None:
    shown = refused(head, tmp_path, ROOT, {"PATCHSTREAM_NEEDS_ENV": "PATH SOME_TOKEN", "SOME_TOKEN": "hush"})
    assert shown.count("SOME_TOKEN not set in its environment") == 2
    assert "hush" not in shown


@pytest.mark.slow
def test_folders_that_a_node_does_not_see(head: LocalCluster, tmp_path: Path) -> None:
    """A path of the driver's own: no other process has its working directory there."""
    own = Path("/proc/self/cwd")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").touch()
    shown = refused(head, tmp_path, ROOT, source=own / "photos", out=own / "out")
    assert re.search(
        r"1 of 2 nodes cannot work on this job:\n  node \w+ on \S+: does not see "
        r"/proc/self/cwd/out/manifest/\S+\.parquet, /proc/self/cwd/photos/a\.jpg\n"
        r"Local paths of --out and of sources must lead to the same files on every node: .* \(s3://BUCKET/PREFIX\)",
        shown,
    )


def test_an_output_that_a_node_which_joined_later_does_not_see(tmp_path: Path) -> None:
    part = ManifestPart("manifest-000000000000-000000000001-5f0c3a1e.parquet", 0, 1)
    driver = release()._replace(host="another")
    job = DecodeJob(str(tmp_path / "out"), [part], Reading(Preprocessing(resize=(1, 1))), 1, "run", driver, null=True)
    ranges = pa.table({"start": [0], "stop": [1]})
    with pytest.raises(ClusterError, match=r"does not see \S+/out, the output of the job, which another sees\. Local"):
        next(decode_rows(ranges, job))
    with pytest.raises(OutputError, match="of the run's manifest"):  # on the driver's machine it is damaged or lost
        next(decode_rows(ranges, job._replace(driver=release())))

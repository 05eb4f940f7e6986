"""The Triton predictor against a real server: same numbers as torch, and it outlives a server that dies."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from support.certificates import self_signed
from support.ports import free_port
from support.triton import TritonServer, server_folder, triton_server

from pipeline.models import ModelInfo, inspect_model
from pipeline.predictors.batches import Wanted
from pipeline.predictors.torch_predictor import TorchPredictor
from pipeline.predictors.triton import TritonPredictor, check_server
from pipeline.predictors.triton_protocol import default_model_name
from pipeline.predictors.triton_repository import Serving, export_triton
from schemas.errors import ClusterError, SpecError
from schemas.spec import TritonSpec
from schemas.tables import decoded_schema

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SIDE = 32
MAX_BATCH = 8
# Triton's restricted protocols want the header under this prefix.
HEADER = "triton-grpc-protocol-x-token"


class Exported(NamedTuple):
    info: ModelInfo
    wanted: Wanted
    repository: Path

    @property
    def name(self) -> str:
        return default_model_name(self.info)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    from support.checkpoints import make_checkpoint

    server_folder()
    folder = tmp_path_factory.mktemp("models")
    info = inspect_model(str(make_checkpoint(folder / "vit", "vit-classifier", image_size=SIDE, patch_size=8)))
    repository = folder / "repository"
    assert export_triton(info, str(repository), Serving(max_batch_size=MAX_BATCH), onnx=False) == [f"vit-{SIDE}x{SIDE}"]
    wanted = Wanted(("cls", "pooled"), (info.hidden_size, info.pooled_size), "float32", 5, info.labels, False)
    return Exported(info, wanted, repository)


@pytest.fixture(scope="module")
def server(exported: Exported, log_dir: Path) -> Iterator[TritonServer]:
    with triton_server(exported.repository, [exported.name], log_dir=log_dir) as running:
        yield running


@contextlib.contextmanager
def predicting(exported: Exported, spec: TritonSpec) -> Iterator[TritonPredictor]:
    predictor = TritonPredictor(exported.info, exported.wanted, spec)
    try:
        yield predictor
    finally:
        predictor.close()


def decoded(rows: int, *, seed: int = 0, broken: tuple[int, ...] = ()) -> pa.Table:
    """Random pixels; the rows in `broken` failed to decode."""
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, SIDE, SIDE, 3), dtype=np.uint8)
    values = {
        "row": list(range(rows)),
        "uri": [f"file:///{i}.png" for i in range(rows)],
        "pixels": [None if i in broken else pixels[i].tobytes() for i in range(rows)],
        "stage": ["decode" if i in broken else None for i in range(rows)],
        "error": ["Truncated" if i in broken else None for i in range(rows)],
        "retryable": [False if i in broken else None for i in range(rows)],
    }
    schema = decoded_schema([])
    return pa.table([pa.array(values.get(f.name, [None] * rows), f.type) for f in schema], schema=schema)


def with_torch(exported: Exported, table: pa.Table) -> pa.Table:
    return TorchPredictor(exported.info, exported.wanted, dtype="float32", batch_size=16, threads=1)(table)


def assert_same(got: pa.Table, expected: pa.Table) -> None:
    """Equal but for the time taken and for float32's last digits."""
    assert got.schema == expected.schema
    exact = [name for name in got.column_names if name not in ("cls", "pooled", "labels", "predict_s")]
    assert got.select(exact).equals(expected.select(exact))
    for name in ("cls", "pooled", "labels"):
        assert got[name].is_null().equals(expected[name].is_null())
    for name in ("cls", "pooled"):
        ours, theirs = (np.array(t[name].drop_null().to_pylist(), np.float32) for t in (got, expected))
        assert np.abs(ours - theirs).max() <= 1e-5
    for ours, theirs in zip(
        got["labels"].drop_null().to_pylist(), expected["labels"].drop_null().to_pylist(), strict=True
    ):
        assert [label["label"] for label in ours] == [label["label"] for label in theirs]
        assert [x["score"] for x in ours] == pytest.approx([x["score"] for x in theirs], abs=1e-5)


@pytest.mark.parametrize("shared", [True, False], ids=["shared-memory", "over-the-wire"])
def test_same_tables_as_torch(
    exported: Exported, server: TritonServer, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    if not shared:
        monkeypatch.setattr("pipeline.predictors.triton_connection.is_this_host", lambda host: False)
    table = decoded(45, broken=(0, 17, 44))
    with predicting(exported, TritonSpec(url=server.url, in_flight=3)) as predict:
        result = predict(table)
        connection = predict._slots.get()
        assert connection is not None
        assert connection.shares_memory is shared
        predict._slots.put(connection)
    assert_same(result, with_torch(exported, table))
    assert result["predict_s"].to_numpy().sum() > 0


def test_nothing_to_do(exported: Exported, server: TritonServer) -> None:
    with predicting(exported, TritonSpec(url=server.url)) as predict:
        for table in (decoded(0), decoded(3, broken=(0, 1, 2))):
            assert_same_failures(predict(table), table)


def assert_same_failures(got: pa.Table, table: pa.Table) -> None:
    assert got["error"].equals(table["error"])
    assert got["cls"].null_count == table.num_rows


def test_no_shared_memory_is_left_behind(exported: Exported, server: TritonServer) -> None:
    with predicting(exported, TritonSpec(url=server.url)) as predict:
        predict(decoded(8))
        assert not list(Path("/dev/shm").glob(f"patchstream-{os.getpid()}-*"))


def test_several_requests_are_in_flight(exported: Exported, server: TritonServer) -> None:
    with predicting(exported, TritonSpec(url=server.url, in_flight=4)) as predict:
        predict(decoded(4 * MAX_BATCH))
        connections = [predict._slots.get() for _ in range(4)]
        assert sum(connection is not None for connection in connections) >= 2
        for connection in connections:
            predict._slots.put(connection)


def test_check_before_the_start(exported: Exported, server: TritonServer) -> None:
    served = check_server(exported.info, exported.wanted, TritonSpec(url=server.url))
    assert served.name == exported.name
    assert served.max_batch_size == MAX_BATCH
    assert served.dtype == "float32"


def test_another_digest_is_refused(exported: Exported, server: TritonServer, tmp_path: Path) -> None:
    from support.checkpoints import make_checkpoint

    other = inspect_model(
        str(make_checkpoint(tmp_path / "vit", "vit-classifier", image_size=SIDE, patch_size=8, seed=1))
    )
    spec = TritonSpec(url=server.url, model_name=exported.name)
    with pytest.raises(SpecError, match=f"digest: the run needs {other.digest}, the server has {exported.info.digest}"):
        check_server(other, exported.wanted, spec)
    with (
        predicting(exported._replace(info=other), spec) as predict,
        pytest.raises(SpecError, match="digest"),
    ):
        predict(decoded(4))


def test_another_shape_is_refused(exported: Exported, server: TritonServer) -> None:
    other = inspect_model(exported.info.name, image_size=64)
    spec = TritonSpec(url=server.url, model_name=exported.name)
    with pytest.raises(SpecError, match=r"input pixels: the run needs TYPE_UINT8 \[64, 64, 3\]"):
        check_server(other, exported.wanted, spec)


def test_an_output_that_is_not_there_is_refused(exported: Exported, server: TritonServer) -> None:
    wide = exported.wanted._replace(dims=(exported.info.hidden_size, exported.info.pooled_size + 1))
    with pytest.raises(SpecError, match="output pooled: the run needs TYPE_FP32"):
        check_server(exported.info, wide, TritonSpec(url=server.url))


def test_an_unknown_model_is_named(exported: Exported, server: TritonServer) -> None:
    with pytest.raises(ClusterError, match="no model nobody answers there"):
        check_server(exported.info, exported.wanted, TritonSpec(url=server.url, model_name="nobody"), connect_s=3.0)


def test_an_address_where_nobody_listens(exported: Exported) -> None:
    started = time.monotonic()
    with pytest.raises(ClusterError, match="--triton-url"):
        check_server(exported.info, exported.wanted, TritonSpec(url=f"grpc://127.0.0.1:{free_port()}"), connect_s=3.0)
    assert time.monotonic() - started < 10


def test_a_server_that_never_returns_makes_failures_and_not_a_hang(exported: Exported) -> None:
    spec = TritonSpec(url=f"grpc://127.0.0.1:{free_port()}", outage_s=1.0, in_flight=2)
    with predicting(exported, spec) as predict:
        started = time.monotonic()
        first = predict(decoded(5, broken=(1,)))
        assert 0.9 < time.monotonic() - started < 20
        started = time.monotonic()
        second = predict(decoded(5))
        assert time.monotonic() - started < 5
    assert first["error"].to_pylist() == ["ServerAway", "Truncated", "ServerAway", "ServerAway", "ServerAway"]
    assert first["stage"].to_pylist() == ["predict", "decode", "predict", "predict", "predict"]
    assert first["retryable"].to_pylist() == [True, False, True, True, True]
    assert first["row"].to_pylist() == list(range(5))
    assert set(second["error"].to_pylist()) == {"ServerAway"}
    assert second["cls"].null_count == 5


def test_rows_wait_for_a_server_that_is_killed_and_comes_back(exported: Exported, log_dir: Path) -> None:
    tables = [decoded(24, seed=seed) for seed in range(6)]
    results: list[pa.Table] = []
    with contextlib.ExitStack() as servers:
        first = servers.enter_context(triton_server(exported.repository, [exported.name], log_dir=log_dir))
        with predicting(exported, TritonSpec(url=first.url, outage_s=120, in_flight=3)) as predict:
            results.append(predict(tables[0]))
            os.killpg(first.process.pid, signal.SIGKILL)
            worker = threading.Thread(target=lambda: results.extend(predict(table) for table in tables[1:]))
            worker.start()
            time.sleep(1.0)
            assert len(results) == 1
            servers.enter_context(triton_server(exported.repository, [exported.name], log_dir=log_dir, port=first.port))
            worker.join(timeout=120)
            assert not worker.is_alive()
    assert len(results) == len(tables)
    for table, result in zip(tables, results, strict=True):
        assert_same(result, with_torch(exported, table))


def test_a_server_that_died_and_came_back_while_nobody_asked(exported: Exported, log_dir: Path) -> None:
    table = decoded(24)
    with contextlib.ExitStack() as servers:
        first = servers.enter_context(triton_server(exported.repository, [exported.name], log_dir=log_dir))
        with predicting(exported, TritonSpec(url=first.url, in_flight=3)) as predict:
            predict(table)
            os.killpg(first.process.pid, signal.SIGKILL)
            servers.enter_context(triton_server(exported.repository, [exported.name], log_dir=log_dir, port=first.port))
            for _ in range(3):
                assert_same(predict(table), with_torch(exported, table))


def test_a_server_stopped_in_its_tracks_misses_the_deadline_and_recovers(
    exported: Exported, server: TritonServer
) -> None:
    spec = TritonSpec(url=server.url, deadline_s=1.0, outage_s=60, in_flight=1)
    table = decoded(4, seed=1)
    with predicting(exported, spec) as predict:
        predict(decoded(4))
        os.killpg(server.process.pid, signal.SIGSTOP)
        resume = threading.Timer(2.5, os.killpg, (server.process.pid, signal.SIGCONT))
        resume.start()
        started = time.monotonic()
        result = predict(table)
        assert time.monotonic() - started > 1.5
        resume.join()
    assert_same(result, with_torch(exported, table))


def test_tls_and_headers(exported: Exported, log_dir: Path, tmp_path: Path) -> None:
    """In a process of its own: gRPC reads the roots that it trusts once."""
    certificate, key = self_signed(tmp_path)
    options = ["--grpc-use-ssl=true", f"--grpc-server-cert={certificate}", f"--grpc-server-key={key}"]
    options += ["--grpc-restricted-protocol=inference,model-repository,model-config,health:x-token=let-me-in"]
    trusting = {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(certificate)}
    with triton_server(exported.repository, [exported.name], log_dir=log_dir, options=options) as server:
        url = f"grpcs://localhost:{server.port}"
        assert check_elsewhere(exported, url, "let-me-in", trusting) == exported.name
        assert "let-me-in" not in check_elsewhere(exported, url, "open-sesame", trusting)
        assert "no model" in check_elsewhere(exported, url, "let-me-in", {})


def check_elsewhere(exported: Exported, url: str, token: str, environment: dict[str, str]) -> str:
    """The name of the model that `check_server` finds, or its error."""
    program = """
import sys
from pipeline.models import inspect_model
from pipeline.predictors.batches import Wanted
from pipeline.predictors.triton import check_server
from schemas.errors import PatchstreamError
from schemas.spec import TritonSpec
model, url, header, token = sys.argv[1:]
info = inspect_model(model)
wanted = Wanted(("cls",), (info.hidden_size,), "float32", 0, info.labels, False)
try:
    print(check_server(info, wanted, TritonSpec(url=url, headers={header: token}), connect_s=3.0).name)
except PatchstreamError as error:
    print(error)
"""
    arguments = [sys.executable, "-c", program, exported.info.name, url, HEADER.title(), token]
    done = subprocess.run(
        arguments, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()

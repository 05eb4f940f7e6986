"""The Triton predictor against a real server: same numbers as torch, and another model is refused."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from support.certificates import self_signed
from support.ports import free_port
from support.served_model import MAX_BATCH, Exported, assert_same, decoded, export, predicting, with_torch
from support.triton import TritonServer, server_folder, triton_server

from pipeline.models import inspect_model
from pipeline.predictors.actor import ActorJob, build_predictor
from pipeline.predictors.triton import check_server
from schemas.errors import ClusterError, SpecError
from schemas.spec import TritonSpec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Triton's restricted protocols want the header under this prefix.
HEADER = "triton-grpc-protocol-x-token"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    server_folder()
    return export(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(exported: Exported, log_dir: Path) -> Iterator[TritonServer]:
    with triton_server(exported.repository, [exported.name], log_dir=log_dir) as running:
        yield running


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
    other = export(tmp_path, seed=1).info
    spec = TritonSpec(url=server.url, model_name=exported.name)
    with pytest.raises(SpecError, match=f"digest: the run needs {other.digest}, the server has {exported.info.digest}"):
        check_server(other, exported.wanted, spec)
    with (
        predicting(exported._replace(info=other), spec) as predict,
        pytest.raises(SpecError, match="digest"),
    ):
        predict(decoded(4))


def test_another_precision_than_at_the_start_is_refused(exported: Exported, server: TritonServer) -> None:
    job = ActorJob(
        backend="triton", model=exported.info, wanted=exported.wanted, dtype="bfloat16", batch_size=8, threads=1,
        cuda=False, triton=TritonSpec(url=server.url), storage_options={},
    )  # fmt: skip
    with (
        contextlib.closing(build_predictor(job)) as predict,
        pytest.raises(SpecError, match="dtype: the run needs bfloat16, the server has float32"),
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
        assert "no model" in check_elsewhere(exported, url, "let-me-in", {}, connect_s=3.0)


def check_elsewhere(
    exported: Exported, url: str, token: str, environment: dict[str, str], *, connect_s: float = 30.0
) -> str:
    """The name of the model that `check_server` finds, or its error."""
    program = """
import sys
from pipeline.models import inspect_model
from pipeline.predictors.batches import Wanted
from pipeline.predictors.triton import check_server
from schemas.errors import PatchstreamError
from schemas.spec import TritonSpec
model, url, header, token, connect_s = sys.argv[1:]
info = inspect_model(model)
wanted = Wanted(("cls",), (info.hidden_size,), "float32", 0, info.labels, False)
try:
    print(check_server(info, wanted, TritonSpec(url=url, headers={header: token}), connect_s=float(connect_s)).name)
except PatchstreamError as error:
    print(error)
"""
    arguments = [sys.executable, "-c", program, exported.info.name, url, HEADER.title(), token, str(connect_s)]
    done = subprocess.run(
        arguments, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()

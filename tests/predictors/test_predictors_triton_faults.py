"""The Triton predictor while its server dies, stops, comes back, or comes back with another model."""

import contextlib
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest
from support.ports import LOOPBACK, free_port
from support.served_model import Exported, assert_same, decoded, export, predicting, with_torch
from support.triton import LONGEST_START_S, server_folder, triton_server

from schemas.errors import SpecError
from schemas.spec import TritonSpec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    server_folder()
    return export(tmp_path_factory.mktemp("models"))


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


def test_rows_wait_for_a_machine_that_has_gone_silent(exported: Exported) -> None:
    """Connections are taken and nothing is ever said: each try ends by its own limit, which is no reason to give up."""
    with socket.create_server((LOOPBACK, 0)) as silent:
        spec = TritonSpec(url=f"grpc://{LOOPBACK}:{silent.getsockname()[1]}", deadline_s=0.2, outage_s=5.0, in_flight=1)
        with predicting(exported, spec) as predict:
            started = time.monotonic()
            result = predict(decoded(2))
            assert 4.9 < time.monotonic() - started < 60
    assert result["error"].to_pylist() == ["ServerAway"] * 2
    assert result["retryable"].to_pylist() == [True] * 2


def test_rows_wait_for_a_server_that_is_killed_and_comes_back(exported: Exported, log_dir: Path) -> None:
    tables = [decoded(24, seed=seed) for seed in range(6)]
    results: list[pa.Table] = []
    with contextlib.ExitStack() as servers:
        first = servers.enter_context(triton_server(exported.repository, [exported.name], log_dir=log_dir))
        with predicting(exported, TritonSpec(url=first.url, outage_s=LONGEST_START_S + 100, in_flight=3)) as predict:
            results.append(predict(tables[0]))
            os.killpg(first.process.pid, signal.SIGKILL)
            worker = threading.Thread(target=lambda: results.extend(predict(table) for table in tables[1:]))
            worker.start()
            time.sleep(1.0)
            assert len(results) == 1
            servers.enter_context(triton_server(exported.repository, [exported.name], log_dir=log_dir, port=first.port))
            worker.join(timeout=300)
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


def test_a_server_that_comes_back_with_another_model_is_refused(
    exported: Exported, log_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.predictors.triton_connection.is_this_host", lambda host: False)
    other = export(tmp_path, seed=1)
    with contextlib.ExitStack() as servers:
        first = servers.enter_context(triton_server(exported.repository, [exported.name], log_dir=log_dir))
        with predicting(exported, TritonSpec(url=first.url, in_flight=1)) as predict:
            predict(decoded(4))
            os.killpg(first.process.pid, signal.SIGKILL)
            second = triton_server(other.repository, [exported.name], log_dir=log_dir, port=first.port)
            servers.enter_context(second)
            with pytest.raises(SpecError, match="digest"):
                predict(decoded(4))


def test_a_server_stopped_in_its_tracks_misses_the_deadline_and_recovers(exported: Exported, log_dir: Path) -> None:
    table = decoded(4, seed=1)
    with triton_server(exported.repository, [exported.name], log_dir=log_dir) as server:
        spec = TritonSpec(url=server.url, deadline_s=1.0, outage_s=60, in_flight=1)
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

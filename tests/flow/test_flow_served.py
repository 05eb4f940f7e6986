"""A whole job through a real Triton server: what the server counts of it, and what is left there afterwards."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as triton
from support.commands import end, start
from support.served_model import MAX_BATCH, Exported, export
from support.triton import TritonServer, server_folder, triton_server

from jobs.demo.draw import write_pictures
from pipeline.flow import Connect, run
from pipeline.opening import ResolvedJob
from schemas.spec import build_spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PICTURES = 64
COPIES = 4


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    server_folder()
    return export(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(exported: Exported, log_dir: Path) -> Iterator[TritonServer]:
    with triton_server(exported.repository, [exported.name], log_dir=log_dir) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[Any]:
    with triton.InferenceServerClient(server.url.removeprefix("grpc://")) as asking:
        yield asking


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, PICTURES, seed=3)
    return [str(folder)] * COPIES


def regions(client: Any) -> Any:
    """What the server has mapped of its clients' memory."""
    return client.get_system_shared_memory_status(as_json=True).get("regions", {})


def left(client: Any) -> Any:
    """The same, once the actors have had time to end by themselves, behind the job."""
    patient_until = time.monotonic() + 120
    while regions(client) and time.monotonic() < patient_until:
        time.sleep(0.2)
    return regions(client)


def counted(client: Any, name: str) -> tuple[int, int]:
    """Requests and images that the server has answered."""
    (model,) = client.get_inference_statistics(name, as_json=True)["model_stats"]
    return int(model["inference_stats"].get("success", {}).get("count", 0)), int(model.get("inference_count", 0))


def test_requests_carry_full_batches(
    exported: Exported,
    server: TritonServer,
    client: Any,
    sources: list[str],
    tmp_path: Path,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a model that is taken for one as heavy as ViT-B, of which a core here would compute three images in 2 s."""
    monkeypatch.setattr(ResolvedJob, "image_gflop", 34.0)
    values = {"sources": sources, "model": exported.info.name, "out": str(tmp_path / "o"), "backend": "triton"}
    spec = build_spec({**values, "triton": {"url": server.url}})
    before = counted(client, exported.name)
    assert run(spec, connect).images == COPIES * PICTURES
    requests, images = (now - then for now, then in zip(counted(client, exported.name), before, strict=True))
    assert images == COPIES * PICTURES
    assert requests == images / MAX_BATCH


def test_shared_memory_is_given_back_at_the_end_of_a_job(
    exported: Exported, server: TritonServer, client: Any, sources: list[str], tmp_path: Path, connect: Connect
) -> None:
    seen: list[Any] = []
    values = {"sources": sources, "model": exported.info.name, "out": str(tmp_path / "o"), "backend": "triton"}
    spec = build_spec({**values, "triton": {"url": server.url}, "sink": {"commit_s": 0.1}})
    summary = run(spec, connect, lambda progress: seen.append(regions(client)))
    assert summary.images == COPIES * PICTURES
    assert any(seen), "no memory was shared: there is nothing to give back"
    assert not left(client)


def test_shared_memory_is_given_back_at_the_end_of_a_command(
    exported: Exported, server: TritonServer, client: Any, sources: list[str], tmp_path: Path
) -> None:
    """Whose Ray ends with it, and its actors too."""
    log = tmp_path / "log"
    seen: list[Any] = []
    where = ["--out", tmp_path / "o", "--backend", "triton", "--triton-url", server.url]
    command = start("embed", *sources, "--model", exported.info.name, *where, log=log)
    try:
        while command.poll() is None:
            seen.append(regions(client))
            time.sleep(0.05)
    finally:
        end(command.pid)
    assert command.returncode == 0, log.read_text()
    assert any(seen), "no memory was shared: there is nothing to give back"
    assert not left(client)

"""A model of the hub, fetched by several processes of one machine, and found again without a network."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.checkpoints import make_checkpoint
from support.ports import free_port

from pipeline.models import inspect_model, load_model
from schemas.errors import CheckpointError

COMMIT = "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3"
NAME = "somebody/vit"
TOKENS = f"/api/models/{NAME}/xet-read-token/"


@dataclass
class Hub:
    """A hub with one model. `snapshot` is where huggingface_hub keeps it on this machine. With `storage` the weights
    lie there, behind a Xet server of that address. It answers once `talks` is set."""

    folder: Path
    snapshot: Path
    asked: list[str]
    gated: bool = False
    status: int | None = None
    storage: str = ""
    url: str = ""
    commit: str = COMMIT
    talks: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    folder = make_checkpoint(tmp_path / "vit", "vit", image_size=32, hidden_size=32, num_attention_heads=2)
    (folder / "README.md").write_text("of no use here")
    cache = tmp_path / "hub"
    found = Hub(folder, cache / "models--somebody--vit/snapshots" / COMMIT, [])
    with _serving(found) as url:
        found.url = url
        found.talks.set()
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        yield found
        found.talks.set()


@contextmanager
def _serving(hub: Hub) -> Iterator[str]:
    """The part of the hub's API that fetching a model takes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.asked.append(self.path)
            hub.talks.wait()
            if hub.gated or hub.status:
                self.send_response(hub.status or 403)
                if hub.gated:
                    self.send_header("X-Error-Code", "GatedRepo")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            path = self.path.partition("?")[0]
            files = sorted(hub.folder.iterdir())
            if path.startswith(TOKENS):
                access = {"Cas-Url": hub.storage, "Access-Token": "token", "Token-Expiration": "9999999999"}
                self.answer(b"{}", **{f"X-Xet-{name}": value for name, value in access.items()})
            elif path.startswith(f"/api/models/{NAME}/tree/"):
                tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
                self.answer(json.dumps(tree).encode())
            elif path.startswith(f"/api/models/{NAME}"):
                siblings = [{"rfilename": file.name} for file in files]
                self.answer(json.dumps({"id": NAME, "sha": hub.commit, "siblings": siblings}).encode())
            elif (hub.folder / Path(path).name).is_file():
                xet = {"X-Xet-Hash": "a" * 64, "Link": f'<{hub.url}{TOKENS}>; rel="xet-auth"'}
                stored = hub.storage and path.endswith(".safetensors")
                self.answer((hub.folder / Path(path).name).read_bytes(), **xet if stored else {})
            else:
                self.send_error(404)

        do_HEAD = do_GET

        def answer(self, body: bytes, **headers: str) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.send_header("X-Repo-Commit", hub.commit)
            self.send_header("ETag", f'"{len(body)}"')
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def test_a_snapshot_that_another_process_still_fetches(hub: Hub) -> None:
    """It has its folder before it has its weights."""
    info = inspect_model(NAME)
    (hub.snapshot / "model.safetensors").unlink()
    load_model(info)
    (hub.snapshot / "config.json").unlink()
    load_model(info)


def test_a_complete_snapshot_is_loaded_without_asking_the_hub(hub: Hub) -> None:
    info = inspect_model(NAME)
    hub.asked.clear()
    load_model(info)
    assert hub.asked == []


def test_what_was_fetched_is_found_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although huggingface_hub knows of files that were never asked for."""
    info = inspect_model(NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert inspect_model(NAME) == info
    load_model(info)
    (hub.snapshot / "model.safetensors").unlink()
    for use in (lambda: inspect_model(NAME), lambda: load_model(info)):
        with pytest.raises(CheckpointError, match=r"not in the hub's cache .*HF_HUB_OFFLINE is set"):
            use()


@pytest.mark.parametrize("name", ["models/vit--large", "modèle/größe", "vit-base."])
def test_a_name_that_no_model_of_the_hub_can_have(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder; a model is a folder, an object-store prefix or a hub"):
        inspect_model(name)


def test_a_model_with_terms_says_where_to_accept_them(hub: Hub) -> None:
    hub.gated = True
    with pytest.raises(
        CheckpointError, match=rf"gated. Accept its terms at https://huggingface.co/{NAME}, then log in"
    ):
        inspect_model(NAME)


@pytest.mark.parametrize("with_config", [True, False])
def test_weights_of_other_names_are_those_that_the_hub_has(hub: Hub, with_config: bool) -> None:
    (hub.folder / "model.safetensors").rename(hub.folder / "checkpoint-9.pth")
    (hub.folder / "training_args.bin").touch()
    if not with_config:
        for name in ("config.json", "preprocessor_config.json"):
            (hub.folder / name).unlink()
    said = rf"{NAME}: has neither model\.safetensors nor pytorch_model\.bin\. Its weight files: checkpoint-9\.pth\. "
    with pytest.raises(CheckpointError, match=said) as error:
        inspect_model(NAME)
    assert f"hf download {NAME} checkpoint-9.pth --local-dir FOLDER" in str(error.value)
    assert hub.asked == [f"/api/models/{NAME}"], "nothing is fetched"
    (hub.folder / "checkpoint-9.pth").unlink()
    with pytest.raises(CheckpointError, match=r"Its weight files: none\. Name another model"):
        inspect_model(NAME)


def test_an_adapter_on_the_hub(hub: Hub) -> None:
    (hub.folder / "model.safetensors").rename(hub.folder / "adapter_model.safetensors")
    (hub.folder / "adapter_config.json").write_text('{"base_model_name_or_path": "google/vit-base"}')
    with pytest.raises(CheckpointError, match="an adapter for google/vit-base, not a model"):
        inspect_model(NAME)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_was_fetched_is_found_while_the_hub_is_out_of_order(hub: Hub, status: int) -> None:
    info = inspect_model(NAME)
    hub.status = status
    assert inspect_model(NAME) == info
    load_model(info)
    (hub.snapshot / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=rf"not in the hub's cache .* the hub answers: .*{status}.*Try again later"
    ):
        inspect_model(NAME)


def test_a_hub_that_refuses_is_not_one_that_is_out_of_order(hub: Hub) -> None:
    inspect_model(NAME)
    hub.status = 403
    with pytest.raises(CheckpointError, match=r"(?s)the hub refuses: .*403"):
        inspect_model(NAME)


ASK = """
import resource, signal, sys
from pipeline.models import inspect_model
from schemas.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
try:
    print(inspect_model(sys.argv[1]).revision)
except CheckpointError as error:
    print(error)
"""


@pytest.fixture
def ask(hub: Hub, isolated_env: Callable[[Mapping[str, str]], dict[str, str]]) -> Callable[..., str]:
    """What another process, with the same cache, says of the model. It can write files of `room` bytes."""

    def run(room: int = -1) -> str:
        variables = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(hub.snapshot.parents[2]), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", ASK, NAME, str(room)],
            env=isolated_env({**variables, "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1"}),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_storage_behind_the_hub_that_cannot_be_reached(hub: Hub, ask: Callable[..., str]) -> None:
    """hf_xet has one error for it all."""
    hub.storage = f"http://127.0.0.1:{free_port()}"
    said = ask()
    assert f"{NAME}: cannot be fetched: " in said
    assert hub.storage in said
    assert "with HF_HUB_DISABLE_XET=1 it is fetched without hf_xet" in said
    hub.storage = ""
    assert ask() == f"{COMMIT}\n"


def test_a_cache_of_the_hub_that_cannot_be_written(
    hub: Hub, ask: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no lack of a network."""
    said = ask(room=20_000)
    assert f"{NAME}: cannot be kept in {hub.snapshot.parents[2]}: File too large. Make room there" in said
    assert "name another folder with HF_HOME" in said
    (tmp_path / "a file").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "a file"))
    with pytest.raises(CheckpointError, match=r"cannot be kept in .*/a file: Not a directory\. .*HF_HOME"):
        inspect_model(NAME)


@pytest.mark.timeout(60)
def test_a_hub_that_never_answers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 1)
    info = inspect_model(NAME)
    hub.asked.clear()
    assert inspect_model(NAME) == info
    assert hub.asked == [f"/api/models/{NAME}"]
    hub.talks.clear()
    assert inspect_model(NAME) == info
    (hub.snapshot / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the hub cannot be reached"):
        inspect_model(NAME)


@pytest.mark.parametrize("revision", [None, "v1/small", COMMIT])
def test_a_revision_is_found_again_without_a_network(
    hub: Hub, revision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = inspect_model(NAME, revision=revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert inspect_model(NAME, revision=revision) == info


def test_what_was_fetched_stands_until_its_successor_is_there(hub: Hub, ask: Callable[..., str]) -> None:
    weights = hub.folder / "model.safetensors"
    assert ask() == f"{COMMIT}\n"
    save_file(load_file(weights), weights, metadata={"made": "anew, so that it is longer"})
    hub.commit, hub.storage = "b" * 40, f"http://127.0.0.1:{free_port()}"
    assert ask() == f"{COMMIT}\n"
    hub.storage = ""
    assert ask() == f"{hub.commit}\n"
    hub.status = 503
    assert ask() == f"{hub.commit}\n"

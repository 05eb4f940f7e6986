"""`report` and `explore` as a person types them."""

import dataclasses
import http.client
import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import typer
from report.album import Album
from report.explore_client import Client, serving
from support.commands import PATCHSTREAM
from support.processes import Process, running
from support.runs import run_record
from support.testdata import needs_testdata, photos, trained_vit
from typer.testing import CliRunner

from jobs import explore
from jobs.explore import COMMANDS as EXPLORE
from jobs.report import COMMANDS as REPORT
from schemas.errors import CheckpointError, ImageError, Interrupted, OutputError, SpecError
from schemas.run import ModelRecord

# As `explore … &` in a script, or under nohup: Python then installs no handler of its own.
_IGNORING = ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")


def run(*arguments: str) -> str:
    app = typer.Typer()
    for name, command in {**REPORT, **EXPLORE}.items():
        app.command(name)(command)
    done = CliRunner().invoke(app, arguments, catch_exceptions=True)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_report_command(tmp_path: Path) -> None:
    directory = Album(tmp_path, count=6, failed={}).write()
    assert run("report", str(directory), "--pictures", "3").split()[-1] == f"{directory}/report.html"
    assert (directory / "report.html").read_text().count("<li><figure>") == 3
    assert json.loads(run("report", str(directory), "--json")) == {"report": f"{directory}/report.html"}


def test_report_command_on_no_run(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"run\.json"):
        run("report", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_report_explore_command_serves_until_interrupted(tmp_path: Path, number: int) -> None:
    directory = Album(tmp_path, count=8, failed={}).write()
    arguments = [*_IGNORING, *PATCHSTREAM, "explore", str(directory), "--port", "0"]
    with running(arguments, name="explore", log_dir=tmp_path, ready=_has_started, timeout_s=60) as process:
        address = urlsplit(_address(process))
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=30)
        connection.request("GET", "/picture?row=2")
        page = connection.getresponse().read().decode()
        assert "More like this" in page
        assert "Cosine of cls, exact search." in page
        connection.close()
        process.popen.send_signal(number)
        assert process.popen.wait(15) == 0
        assert "ended" in process.log()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_report_explore_command_is_interrupted_while_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    def load(*_: Any) -> None:
        assert callable(signal.getsignal(number))
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(explore, "_open", load)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(Interrupted) as stopped:
            run("explore", str(tmp_path), "--port", "0")
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.exit_code == code


def test_report_explore_command_refuses_open_doors(tmp_path: Path) -> None:
    directory = Album(tmp_path, count=4, failed={}).write()
    with pytest.raises(SpecError, match="--token"):
        run("explore", str(directory), "--host", "0.0.0.0", "--port", "0")
    with pytest.raises(OutputError, match="holds no feature `pooled`"):
        run("explore", str(directory), "--features", "pooled", "--port", "0")


def test_report_explore_command_asks_for_its_port_before_it_reads(tmp_path: Path) -> None:
    directory = Album(tmp_path, count=4, failed={}).write()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OutputError, match=rf"cannot listen on 127\.0\.0\.1 port {port}: .*another --port"):
            run("explore", str(directory), "--port", str(port))
    assert not (directory / "index").exists(), "where the vectors are copied to"


@pytest.mark.slow
@needs_testdata
def test_report_explore_embeds_by_the_model_of_the_run(tmp_path: Path) -> None:
    from jobs.explore import _open
    from pipeline.embedding import Embedder
    from pipeline.models import inspect_model

    files = photos(6)
    album = Album(tmp_path, count=6, failed={}, dim=192)
    info = inspect_model(str(trained_vit()))
    model = ModelRecord(
        name=info.name, family=info.family, architecture=info.architecture, digest=info.digest, dtype="float32",
        hidden_size=info.hidden_size, num_labels=info.num_labels, pooled=info.pooled, preprocessing=info.preprocessing,
    )  # fmt: skip

    def embedder(model: ModelRecord) -> Any:
        return Embedder(run_record(dataclasses.replace(album.content(), model=model)), "cls").image

    embed = embedder(model)
    album.features = np.stack([embed(path.read_bytes()) for path in files])
    directory = album.write(uris=[str(path) for path in files], model=model)

    with serving(_open(str(directory), None, {})) as server:
        client = Client(server)
        status, headers, _ = client.upload(files[4].read_bytes())
        assert status == 303
        page = client.page("/found", id=headers["location"].partition("=")[2])
        assert re.search(r"\D1\.000 ", page.text)
        first = str(page.attributes("img", "src")[0])
        assert first.endswith("row=4")
    with pytest.raises(ImageError, match=r"^(?!.*/tmp)"):
        embed(b"this is no picture")

    with pytest.raises(CheckpointError, match="other weights"):
        embedder(model.model_copy(update={"digest": "f" * 64}))(files[0].read_bytes())
    darker = info.preprocessing.model_copy(update={"mean": (0.25, 0.25, 0.25)})
    with pytest.raises(CheckpointError, match=r"preprocessing\.mean: there .*25"):
        embedder(model.model_copy(update={"preprocessing": darker}))(files[0].read_bytes())


def _has_started(process: Process) -> bool:
    return "http://" in process.log()


def _address(process: Process) -> str:
    found = re.search(r"http://\S+", process.log())
    assert found
    return found[0]

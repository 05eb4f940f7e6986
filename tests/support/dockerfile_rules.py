"""A Dockerfile as a list of instructions, and the rules that ours keeps. Each rule returns what breaks it."""

import re
import shlex
from collections.abc import Callable
from typing import NamedTuple

COMPILERS = re.compile(
    r"\b(gcc|g\+\+|clang|cc|make|cmake|ninja-build|build-essential|rustc|cargo|golang|python3?-dev)\b"
)
COMPILER_IMAGES = re.compile(r"(-devel|^gcc|^rust|^golang|/buildpack)")
SECRET_NAME = re.compile(r"(secret|token|password|passwd|credential|api_?key|access_?key)", re.IGNORECASE)
PINNED_TAG = re.compile(r"^[\w.\-/]+:(v?\d+\.\d+\.\d+[\w.\-]*)(@sha256:[0-9a-f]{64})?$")


class Instruction(NamedTuple):
    """One instruction with its line continuations joined; `stage` is the name or number of its `FROM`."""

    line: int
    keyword: str
    arguments: str
    stage: str


def parse(text: str) -> list[Instruction]:
    """Instructions of a Dockerfile in order (no heredocs, no parser directives)."""
    instructions: list[Instruction] = []
    stage, stage_count = "", 0
    joined, start = "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        start = start or number
        if line.endswith("\\"):
            joined += line[:-1] + " "
            continue
        keyword, _, arguments = (joined + line).partition(" ")
        arguments = " ".join(arguments.split())
        if keyword.upper() == "FROM":
            name = re.search(r"\bAS\s+(\S+)$", arguments, re.IGNORECASE)
            stage, stage_count = name.group(1) if name else str(stage_count), stage_count + 1
        instructions.append(Instruction(start, keyword.upper(), arguments, stage))
        joined, start = "", 0
    return instructions


def base_of(instructions: list[Instruction]) -> dict[str, str]:
    """Stage name to what stands after its `FROM`."""
    return {item.stage: item.arguments.split()[0] for item in instructions if item.keyword == "FROM"}


def lineage(instructions: list[Instruction], stage: str) -> list[Instruction]:
    """Instructions that shape the image of `stage`: its ancestors' first, then its own."""
    base = base_of(instructions)[stage]
    above = lineage(instructions, base) if base in base_of(instructions) else []
    return above + [item for item in instructions if item.stage == stage]


def final_stages(instructions: list[Instruction]) -> list[str]:
    """Stages that nothing else is built from or copies from: the images that ship."""
    used = set(base_of(instructions).values())
    used |= {name for item in instructions for name in re.findall(r"--from=(\S+)", item.arguments)}
    return [stage for stage in base_of(instructions) if stage not in used]


def pinned_base(instructions: list[Instruction]) -> list[str]:
    """Every image from outside names an exact version."""
    bases = base_of(instructions)
    outside = {base for base in bases.values() if base not in bases and base != "scratch"}
    return [f"{base}: not pinned to a full version" for base in sorted(outside) if not PINNED_TAG.match(base)]


def no_latest(instructions: list[Instruction]) -> list[str]:
    """`latest` is named nowhere."""
    return [f"line {item.line}: latest" for item in instructions if re.search(r":latest\b", item.arguments)]


def not_root(instructions: list[Instruction]) -> list[str]:
    """Each shipped image ends as a numeric user other than 0, which Kubernetes can check against runAsNonRoot."""
    broken = []
    for stage in final_stages(instructions):
        users = [item.arguments for item in lineage(instructions, stage) if item.keyword == "USER"]
        user = users[-1].split(":")[0] if users else "root"
        if not user.isdigit() or int(user) == 0:
            broken.append(f"{stage}: ends as {user}")
    return broken


def lean_apt(instructions: list[Instruction]) -> list[str]:
    """`apt-get install` leaves out recommendations and clears its lists in the same layer."""
    broken = []
    for item in instructions:
        if item.keyword == "RUN" and re.search(r"\bapt(-get)?\b.*\binstall\b", item.arguments):
            if "--no-install-recommends" not in item.arguments:
                broken.append(f"line {item.line}: apt-get install without --no-install-recommends")
            if "rm -rf /var/lib/apt/lists" not in item.arguments:
                broken.append(f"line {item.line}: apt-get install leaves /var/lib/apt/lists")
    return broken


def no_add(instructions: list[Instruction]) -> list[str]:
    """Files are copied; ADD would fetch from the network or unpack in silence."""
    return [f"line {item.line}: ADD" for item in instructions if item.keyword == "ADD"]


def no_download_tools(instructions: list[Instruction]) -> list[str]:
    """Nothing is piped from the network into a shell."""
    return [
        f"line {item.line}: fetches with curl or wget"
        for item in instructions
        if item.keyword == "RUN" and re.search(r"\b(curl|wget)\b", item.arguments)
    ]


def no_secrets(instructions: list[Instruction]) -> list[str]:
    """No ENV or ARG carries a secret: both stay readable in the image's history."""
    broken = []
    for item in instructions:
        if item.keyword in ("ENV", "ARG"):
            names = [word.partition("=")[0] for word in shlex.split(item.arguments)]
            broken += [f"line {item.line}: {name}" for name in names if SECRET_NAME.search(name)]
    return broken


def no_compiler(instructions: list[Instruction]) -> list[str]:
    """No shipped image holds a compiler, neither installed nor in its base."""
    broken = []
    for stage in final_stages(instructions):
        for item in lineage(instructions, stage):
            if item.keyword == "RUN" and "install" in item.arguments and COMPILERS.search(item.arguments):
                broken.append(f"{stage}, line {item.line}: installs a compiler")
            if item.keyword == "FROM" and COMPILER_IMAGES.search(item.arguments.split()[0]):
                broken.append(f"{stage}: built on {item.arguments.split()[0]}")
            if item.keyword == "FROM" and item.arguments.startswith("python:") and "-slim" not in item.arguments:
                broken.append(f"{stage}: the full Python image carries gcc")
    return broken


def constrained_pip(instructions: list[Instruction]) -> list[str]:
    """Each `pip install` is held by constraints.txt, or installs no dependency at all."""
    broken = []
    for item in instructions:
        if item.keyword != "RUN":
            continue
        for command in re.split(r"&&|;", item.arguments):
            if "pip install" in command and "constraints.txt" not in command and "--no-deps" not in command:
                broken.append(f"line {item.line}: pip install without constraints.txt")
    return broken


def exec_form(instructions: list[Instruction]) -> list[str]:
    """CMD and ENTRYPOINT are JSON lists, so that a signal reaches the program and not a shell."""
    return [
        f"line {item.line}: {item.keyword} in shell form"
        for item in instructions
        if item.keyword in ("CMD", "ENTRYPOINT") and not item.arguments.startswith("[")
    ]


def absolute_workdir(instructions: list[Instruction]) -> list[str]:
    """WORKDIR does not depend on what stood before."""
    return [
        f"line {item.line}: relative WORKDIR"
        for item in instructions
        if item.keyword == "WORKDIR" and not item.arguments.startswith("/")
    ]


RULES: dict[str, Callable[[list[Instruction]], list[str]]] = {
    "pinned_base": pinned_base,
    "no_latest": no_latest,
    "not_root": not_root,
    "lean_apt": lean_apt,
    "no_add": no_add,
    "no_download_tools": no_download_tools,
    "no_secrets": no_secrets,
    "no_compiler": no_compiler,
    "constrained_pip": constrained_pip,
    "exec_form": exec_form,
    "absolute_workdir": absolute_workdir,
}

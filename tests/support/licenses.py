"""The page of licences: what every package says of itself that an installation brings along.

python tests/support/licenses.py        writes docs/licenses.md
"""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "licenses.md"
# Extras that a user installs to run something; those of developers stay out.
EXTRAS = ("export",)
# What torch's wheel for NVIDIA GPUs needs besides, and its wheel for CPUs does not.
OF_CUDA = re.compile(r"(nvidia|cuda)-.*|triton")
# What a wheel carries besides the package itself, which its metadata does not say.
CARRIED = {"pi-heif": "; its wheel carries libheif and libde265 (LGPL-3.0)"}
HEAD = """# Licences of the dependencies

What the packages say of themselves that patchstream needs at run time, they and what they need in turn, at the versions
in `constraints.txt`; the extra `export` is among them. What torch for NVIDIA GPUs brings of NVIDIA's own (CUDA,
cuDNN and others, under NVIDIA's licences) and Triton's compiler (MIT) are not. patchstream itself is under Apache-2.0.
Written by `python tests/support/licenses.py`.

| package | version | licence |
| --- | --- | --- |
"""


def closure() -> dict[str, str]:
    """Canonical names of all run-time dependencies on this platform, with the installed version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(text) for text in project["dependencies"]]
    waiting += [Requirement(text) for name in EXTRAS for text in project["optional-dependencies"][name]]
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in requirement.extras or {""}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            if OF_CUDA.fullmatch(name):
                continue
            try:
                package = distribution(name)
            except PackageNotFoundError:
                continue  # for another platform
            found[name] = package.version
            for text in package.requires or []:
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    return found


def licence(name: str) -> str:
    """In this order: the expression, a short text, the classifiers."""
    metadata = distribution(name).metadata
    classifiers = [text.rpartition(" :: ")[2] for text in metadata.get_all("Classifier") or [] if "License ::" in text]
    text = metadata["License-Expression"] or ""
    if not text:
        plain = (metadata["License"] or "").strip()
        text = plain if plain and len(plain) < 60 and "\n" not in plain else " / ".join(classifiers) or plain[:60]
    return (re.sub(r"\s+", " ", text) or "not stated") + CARRIED.get(name, "")


def page() -> str:
    """The whole page."""
    return HEAD + "".join(f"| {name} | {version} | {licence(name)} |\n" for name, version in sorted(closure().items()))


if __name__ == "__main__":
    PAGE.write_text(page())

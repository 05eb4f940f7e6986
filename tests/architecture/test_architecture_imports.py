"""The rules of who may import whom, read from the source text."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("schemas", "pipeline", "jobs", "cluster")
ALLOWED = {
    "schemas": {"schemas"},
    "cluster": {"cluster", "schemas"},
    "pipeline": {"pipeline", "schemas"},
    "jobs": {"jobs", "pipeline", "cluster", "schemas"},
}
# Where a heavy or a foreign library may be imported: a file, or a folder and what begins like this.
HOMES = {
    "ray": (
        "pipeline/flow.py",
        "pipeline/metrics.py",
        "pipeline/sinks/ray_",
        "pipeline/retrieval/ray_",
        "cluster/",
    ),
    "torch": ("pipeline/models/", "pipeline/predictors/torch", "pipeline/retrieval/"),
    "tritonclient": ("pipeline/predictors/triton",),
    "transformers": ("jobs/demo/train.py",),
    "timm": (),
}
EXTRA_TORCH = ("jobs/demo/train.py",)
# `status` also shows a job that `submit` began.
BETWEEN_COMMANDS = {"jobs/directory.py imports jobs.submit"}
STAGES = {"sources", "images", "models", "predictors", "sinks", "retrieval", "report"}


def files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Every module that `path` imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top_level(path: Path) -> set[str]:
    """Modules imported when `path` is imported."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_packages_import_in_one_direction() -> None:
    wrong = [
        f"{relative(path)} imports {name}"
        for path in files()
        for name in imports(path)
        if name.split(".")[0] in PACKAGES and name.split(".")[0] not in ALLOWED[relative(path).split("/")[0]]
    ]
    assert wrong == []


def test_no_modules_import_each_other() -> None:
    """Not in a function either; what only types ask for (`TYPE_CHECKING`) does not count."""
    sources = {relative(path).removesuffix(".py").replace("/", "."): path for path in files()}
    graph = {}
    for module, path in sources.items():
        tree = ast.parse(path.read_text())
        typed = {
            node
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for node in ast.walk(block)
        }
        found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node not in typed]
        names = {str(node.module) for node in found}
        names |= {f"{node.module}.{alias.name}" for node in found for alias in node.names}
        graph[module] = names & sources.keys()
    TopologicalSorter(graph).prepare()


def test_stages_do_not_import_each_other() -> None:
    wrong = []
    for path in files():
        place = relative(path).split("/")
        if place[0] != "pipeline" or len(place) < 3 or place[1] not in STAGES:
            continue
        for name in imports(path):
            parts = name.split(".")
            sideways = parts[0] == "pipeline" and len(parts) > 1 and parts[1] in STAGES - {place[1]}
            if (sideways and (place[1], parts[1]) != ("predictors", "models")) or parts[:2] == ["pipeline", "flow"]:
                wrong.append(f"{relative(path)} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("library", sorted(HOMES))
def test_library_stays_at_home(library: str) -> None:
    homes = HOMES[library] + (EXTRA_TORCH if library == "torch" else ())
    users = [relative(path) for path in files() if any(n.split(".")[0] == library for n in imports(path))]
    assert [user for user in users if not user.startswith(homes)] == []
    empty = {home for home in homes if not any(user.startswith(home) for user in users)}
    assert empty == set(), f"nobody there imports {library}: the rule has lost its meaning"


def test_command_modules_import_nothing_heavy() -> None:
    """`patchstream --help` imports them all."""
    light = {"__future__", "typer", "click", "pydantic", "jobs", "schemas"}
    import sys

    for path in files():
        if relative(path).startswith("jobs/") and "COMMANDS" in path.read_text():
            foreign = {name for name in top_level(path) if name not in sys.stdlib_module_names} - light
            assert foreign == set(), relative(path)


def test_commands_import_no_commands() -> None:
    """What two of them need has a home of its own."""
    commands = {relative(path): path for path in files() if "\nCOMMANDS" in path.read_text()}
    modules = {name.removesuffix(".py").replace("/", ".") for name in commands}
    found = {f"{name} imports {module}" for name, path in commands.items() for module in imports(path) & modules}
    assert found == BETWEEN_COMMANDS


def test_the_tree_names_every_module_beside_the_stages() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text().split("```")[1]
    modules = {path.stem for path in (ROOT / "pipeline").glob("*.py")} - {"__init__"}
    assert {name for name in modules if not re.search(rf"\b{name}\b", tree)} == set()


def test_no_file_outgrows_its_readers() -> None:
    long = {relative(path): len(path.read_text().splitlines()) for path in files()}
    assert {path: lines for path, lines in long.items() if lines >= 300} == {}


def test_functions_stay_short() -> None:
    long = []
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                # A signature and a docstring are documentation; it is the body that must stay short.
                documented = ast.get_docstring(node, clean=False) is not None and len(node.body) > 1
                lines = node.end_lineno - node.body[documented].lineno + 1
                if lines >= 50:
                    long.append(f"{relative(path)}:{node.name} has {lines} lines")
    assert long == []

"""Time and peak memory of the retrieval commands on a million vectors, and exact search against a bare product.

    python benchmarks/retrieval.py [--rows 1000000] [--dim 384] [--folder F] [--only NAME ...] [--json F]

The vectors are made up: 2,000 clusters of directions with noise, in a directory as a run leaves it. Each command runs
in a process of its own, whose peak memory counts everything that was resident, pages of mapped files included.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import environment, median, write

_REPOSITORY = Path(__file__).resolve().parents[1]
_MAKE_MATRIX = "make-matrix"
_COMMANDS: dict[str, list[str]] = {
    "matrix": [_MAKE_MATRIX, "{d}"],
    "sql_count": ["sql", "{d}", "SELECT count(*) AS n FROM images", "--json"],
    "search": ["search", "{d}", "--row", "5", "--json"],
    "search_filtered": ["search", "{d}", "--row", "5", "--filter", "width > 0 AND row % 2 = 0", "--json"],
    "index": ["index", "{d}", "--json"],
    "index_evaluate": ["index", "{d}", "--evaluate", "--json"],
    "search_by_index": ["search", "{d}", "--row", "5", "--index", "main", "--json"],
    "kmeans": ["kmeans", "{d}", "-k", "64", "--json"],
    "duplicates": ["duplicates", "{d}", "--threshold", "0.95", "--json"],
    "probe": ["probe", "{d}", "--label-column", "kind", "--json"],
    "apply": ["apply", "{d}", "--probe", "main", "--out", "{d}-labelled", "--json"],
    "sql_nearest": ["sql", "{d}", "SELECT * FROM nearest(5, 10)", "--json"],
}


def make(folder: Path, rows: int, dim: int) -> None:
    """A run's directory with clustered vectors, one in a thousand of them a near copy of another."""
    import numpy as np

    sys.path.insert(0, str(_REPOSITORY / "tests"))
    from support.runs import RunContent, clustered, write_run

    vectors = clustered(rows, dim, 2000, spread=0.7)
    copies = np.arange(0, rows - 1, 1000)
    vectors[copies + 1] = vectors[copies] * 1.01
    # Twenty classes that a linear classifier can tell apart well, but not fully.
    kind = [f"kind {code:02d}" for code in np.argmax(vectors[:, :20], axis=1)]
    write_run(folder, RunContent({"cls": vectors}, user={"kind": kind}, parts=max(1, rows // 62_500)))


def child(arguments: list[str]) -> None:
    """One command, as the command line runs it, or what all of them do first."""
    if arguments[0] == _MAKE_MATRIX:
        from pipeline.retrieval.store import FeatureStore

        print(json.dumps({"rows": len(FeatureStore.open(arguments[1]).load("cls"))}))
        return
    import typer

    from jobs import retrieve, retrieve_groups, retrieve_labels

    app = typer.Typer()
    for module in (retrieve, retrieve_groups, retrieve_labels):
        for name, function in module.COMMANDS.items():
            app.command(name)(function)
    app(arguments, standalone_mode=False)


def measure(arguments: list[str]) -> dict[str, Any]:
    """Wall time and peak resident memory of one command; its output as JSON."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([sys.executable, __file__, "--child", *arguments], stdout=output, cwd=_REPOSITORY)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    return {
        "wall_s": round(time.monotonic() - started, 2),
        "peak_mib": round(usage.ru_maxrss / 1024),
        "output": json.loads(text),
    }


def compare(directory: str) -> None:
    """Exact search by 1 and 16 vectors, against bare products over the same matrix in memory."""
    import numpy as np
    import torch

    from pipeline.retrieval.nearest import top_k
    from pipeline.retrieval.store import FeatureStore

    matrix = FeatureStore.open(directory).load("cls")
    block = np.array(matrix.vectors)
    tensor = torch.from_numpy(block)
    result: dict[str, Any] = {}
    for count in (1, 16):
        queries = np.random.default_rng(0).standard_normal((count, matrix.dim)).astype(np.float32)
        weights = torch.from_numpy(queries.T.copy())
        ways = {
            "search": lambda queries=queries: top_k(matrix, queries, 10),
            "torch": lambda weights=weights: tensor @ weights,
            "numpy": lambda queries=queries: block @ queries.T,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        # In turns, so that a busy moment of the machine meets all of them alike.
        for _ in range(15):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
        # The best of many: what the machine can do when nothing else runs on it.
        best = {name: round(min(values), 4) for name, values in seconds.items()}
        ratio = round(best["search"] / min(best["torch"], best["numpy"]), 2)
        middle = {f"{name}_median": round(median(values), 4) for name, values in seconds.items()}
        result[f"queries_{count}"] = {**best, "ratio": ratio, **middle}
    print(json.dumps(result))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return
    if sys.argv[1:2] == ["--compare"]:
        compare(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--folder", help="keep the data here and use it again")
    parser.add_argument("--only", nargs="*", choices=["compare", *_COMMANDS])
    parser.add_argument("--json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.folder or temporary) / f"run-{given.rows}-{given.dim}"
        if not (folder / "run.json").exists():
            code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import retrieval; "
            code += f"retrieval.make(retrieval.Path({str(folder)!r}), {given.rows}, {given.dim})"
            subprocess.run([sys.executable, "-c", code], check=True, cwd=_REPOSITORY)
        result: dict[str, Any] = {
            "benchmark": "retrieval",
            "environment": environment(),
            "rows": given.rows,
            "dim": given.dim,
            "commands": {},
        }
        for name, arguments in _COMMANDS.items():
            if given.only and name not in given.only:
                continue
            if name == "matrix":
                shutil.rmtree(folder / "index" / "_matrix", ignore_errors=True)
            result["commands"][name] = _brief(measure([argument.format(d=folder) for argument in arguments]))
            print(name, result["commands"][name], file=sys.stderr, flush=True)
        if not given.only or "compare" in given.only:
            done = subprocess.run(
                [sys.executable, __file__, "--compare", str(folder)], check=True, capture_output=True, cwd=_REPOSITORY
            )
            result["exact_search_s"] = json.loads(done.stdout)
    write(given.json, result)


def _brief(found: dict[str, Any]) -> dict[str, Any]:
    """Without the long parts of a command's output."""
    output = found.pop("output")
    kept = ("recall_at_10", "ms_a_query", "search", "lists", "kind", "groups", "in_groups", "inertia", "passes", "C")
    if isinstance(output, dict):
        found |= {key: output[key] for key in kept if key in output}
        if "linear" in output:
            found["accuracy"] = output["linear"]["accuracy"]
    return found


if __name__ == "__main__":
    main()

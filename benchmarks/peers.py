"""The same photos through the same weights by others and by us, in turn, each as its own process from start to end.

    python benchmarks/peers.py PHOTOS [--images 200] [--rounds 3] [--only NAME…] [--python daft=/path/python] [--json F]

The peers' scripts are in `benchmarks/peers/`; `pip install -e '.[peers]'` brings what they need. Times include
start-up. The features of each peer are compared with ours, so that nobody is fast by computing something else.
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

import numpy as np
from common import environment, make_model, median, write

HERE = Path(__file__).parent / "peers"
COMMANDS: dict[str, list[str]] = {
    "transformers float32": [str(HERE / "transformers_loop.py")],
    "transformers bfloat16": [str(HERE / "transformers_loop.py"), "--dtype", "bfloat16"],
    "ray data, documented way": [str(HERE / "ray_data.py")],
    "ray data, all cores": [str(HERE / "ray_data.py"), "--all-cores"],
    "daft": [str(HERE / "daft_class.py")],
    "timm": [str(HERE / "timm_loop.py")],
    "patchstream float32": [],
    "patchstream int8": [],
    "patchstream": [],
}
REPOSITORY = Path(__file__).resolve().parents[1]


def gather(photos: Path, images: int, folder: Path) -> Path:
    """A folder of `images` files, copies of the photos over and over again."""
    files = sorted(path for path in photos.iterdir() if path.is_file())
    folder.mkdir()
    for number in range(images):
        source = files[number % len(files)]
        shutil.copy(source, folder / f"{number:06d}{source.suffix.lower()}")
    return folder


def possible() -> list[str]:
    """All of them, but for int8 where this CPU does not multiply in it, and float32 where `auto` is that."""
    from pipeline.models.precision import INT8_CPU_FLAGS, choose_dtype, describe_hardware

    left_out = set() if describe_hardware(cuda=False).cpu_flags & INT8_CPU_FLAGS else {"patchstream int8"}
    if choose_dtype("auto", cuda=False) == "float32":
        left_out.add("patchstream float32")
    return [name for name in COMMANDS if name not in left_out]


def run(name: str, python: str, photos: Path, model: Path, out: Path, dtype: str) -> float:
    """Wall seconds of the whole process."""
    command = [python, *COMMANDS[name], str(photos), str(model), str(out)]
    if not COMMANDS[name]:
        dtype = name.removeprefix("patchstream").strip() or dtype
        command = [
            python, "-m", "jobs", "embed", str(photos), "--model", str(model), "--out", str(out), "--features", "cls",
            "--dtype", dtype, "--no-report", "--json",
        ]  # fmt: skip
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1", "DAFT_ANALYTICS_ENABLED": "0"}
    # What a person's shell would have. Ray itself gives each of its actors as many threads as it booked CPUs.
    environment.pop("OMP_NUM_THREADS", None)
    started = time.monotonic()
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"{name}: {' '.join(command)}\n{done.stderr[-3000:]}")
    return seconds


def precision(name: str, out: Path) -> str:
    """What it computed in: ours as its run recorded it."""
    if (out / "run.json").exists():
        return str(json.loads((out / "run.json").read_text())["model"]["dtype"])
    return "bfloat16" if name.endswith("bfloat16") else "float32"


def features(out: Path) -> np.ndarray:
    """CLS features in the order of the file names, (n, D)."""
    import pyarrow.parquet as pq

    path = out / "images" if (out / "images").is_dir() else out
    table = pq.read_table(path, columns=["uri", "cls"])
    order = np.argsort([Path(uri).name for uri in table["uri"].to_pylist()])
    return np.array(table["cls"].to_pylist(), np.float64)[order]


def least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto", help="of patchstream")
    parser.add_argument("--model", type=Path, help="a ViT-B/16 in Hugging Face layout (default: random weights)")
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), default=possible())
    parser.add_argument("--python", nargs="*", default=[], help="NAME=PATH: another interpreter for a peer")
    parser.add_argument("--json")
    options = parser.parse_args()
    pythons = dict(item.split("=", 1) for item in options.python)
    model = options.model or make_model(Path(tempfile.gettempdir()) / "patchstream-vit-base", "vit-base")
    before = environment()
    seconds: dict[str, list[float]] = {name: [] for name in options.only}
    found: dict[str, np.ndarray] = {}
    dtypes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        photos = gather(options.photos, options.images, Path(folder) / "photos")
        for number in range(options.rounds):
            for name in options.only:
                out = Path(folder) / f"{name.replace(' ', '-')}-{number}"
                seconds[name].append(run(name, pythons.get(name, sys.executable), photos, model, out, options.dtype))
                found[name], dtypes[name] = features(out), precision(name, out)
                print(f"{name:<26}{options.images / seconds[name][-1]:>8.2f} images/s", file=sys.stderr, flush=True)
    rates = {name: options.images / median(values) for name, values in seconds.items()}
    ours = rates.get("patchstream")
    results = {
        name: {
            "dtype": dtypes[name],
            "images_per_s": rate,
            "patchstream_over_it": ours / rate if ours else None,
            "least_cosine_to_patchstream": least_cosine(found[name], found["patchstream"]) if ours else None,
            "seconds": seconds[name],
        }
        for name, rate in rates.items()
    }
    write(options.json, {"benchmark": "peers", "environment": before, "images": options.images, "dtype": options.dtype,
                         "rounds": options.rounds, "results": results})  # fmt: skip


if __name__ == "__main__":
    main()

"""What decoding costs by method, and what `--decode fast` does to pixels and features.

    python benchmarks/decode.py PHOTOS… [--model FOLDER] [--size 224] [--rounds 5] [--json F]

Each photo is decoded by every method in turn, `rounds` times; the shortest time of each counts, because on a shared
machine everything else is added to it. Times in milliseconds for one photo. `pillow` is what the image processors of
the reference do: open, upright, RGB, resize. With `--model`, the cosine between the features of fast and exact pixels.
"""

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import environment, median, write
from PIL import Image, ImageOps

from pipeline.images.decode import DecodeSpec, decode_into
from pipeline.images.formats import prepare_process
from pipeline.images.limits import steady_memory
from schemas.preprocessing import Preprocessing

_BANDS = ((0.0, 0.5), (0.5, 3.0), (3.0, 1000.0))  # megapixels
Method = Callable[[bytes, np.ndarray], object]


def methods(preprocessing: Preprocessing) -> dict[str, Method]:
    """Bytes of a file and where its pixels go, by name of the method."""
    exact, fast = (DecodeSpec(preprocessing, mode, 10**9) for mode in ("exact", "fast"))

    def pillow(data: bytes, out: np.ndarray) -> None:
        with Image.open(io.BytesIO(data)) as image:
            picture = ImageOps.exif_transpose(image).convert("RGB")
        out[:] = np.asarray(picture.resize(out.shape[1::-1], Image.Resampling(preprocessing.resample)))

    return {
        "pillow": pillow,
        "exact": lambda data, out: decode_into(data, out, exact),
        "fast": lambda data, out: decode_into(data, out, fast),
    }


def measure(data: bytes, preprocessing: Preprocessing, rounds: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Shortest milliseconds and pixels of each method."""
    every = methods(preprocessing)
    pixels = {name: np.empty((*preprocessing.output_size, 3), np.uint8) for name in every}
    shortest = dict.fromkeys(every, float("inf"))
    for _ in range(rounds):
        for name, method in every.items():
            started = time.perf_counter()
            method(data, pixels[name])
            shortest[name] = min(shortest[name], 1000 * (time.perf_counter() - started))
    return shortest, pixels


def feature_cosines(model: str, fast: list[np.ndarray], exact: list[np.ndarray]) -> list[float]:
    """Cosine between the CLS features of the two, photo by photo."""
    import torch

    from pipeline.models import inspect_model, load_model

    network = load_model(inspect_model(model), dtype=torch.float32)
    cosines: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(fast), 16):
            a, b = (network(torch.from_numpy(np.stack(side[start : start + 16]))).cls for side in (fast, exact))
            cosines += torch.cosine_similarity(a, b).tolist()
    return cosines


def summary(rows: list[dict[str, Any]], low: float, high: float) -> dict[str, Any]:
    """Means of the photos between `low` and `high` megapixels."""
    chosen = [row for row in rows if low <= row["megapixels"] < high]
    if not chosen:
        return {"photos": 0}
    times = {name: sum(row["ms"][name] for row in chosen) / len(chosen) for name in ("pillow", "exact", "fast")}
    return {
        "photos": len(chosen),
        "ms": {name: round(value, 2) for name, value in times.items()},
        "exact_over_pillow": round(times["pillow"] / times["exact"], 2),
        "fast_over_pillow": round(times["pillow"] / times["fast"], 2),
        "exact_equals_pillow": all(row["exact_equals_pillow"] for row in chosen),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--model")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    options = parser.parse_args()
    prepare_process()
    steady_memory()
    preprocessing = Preprocessing(resize=(options.size, options.size))
    if options.model:
        from pipeline.models import inspect_model

        preprocessing = inspect_model(options.model).preprocessing
    files = [
        file for photo in map(Path, options.photos) for file in (sorted(photo.iterdir()) if photo.is_dir() else [photo])
    ]
    rows: list[dict[str, Any]] = []
    changed: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for file in files:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            megapixels = image.width * image.height / 1e6
        shortest, pixels = measure(data, preprocessing, options.rounds)
        equal = bool((pixels["exact"] == pixels["pillow"]).all())
        rows.append({"file": file.name, "megapixels": megapixels, "ms": shortest, "exact_equals_pillow": equal})
        if (pixels["fast"] != pixels["exact"]).any():
            changed[0].append(pixels["fast"].copy())
            changed[1].append(pixels["exact"].copy())
    result: dict[str, Any] = {"benchmark": "decode", "environment": environment(), "photos": len(rows)}
    result["by_megapixels"] = {f"{low:g}-{high:g}": summary(rows, low, high) for low, high in _BANDS}
    if changed[0]:
        distances = [float(np.abs(a.astype(int) - b).mean()) for a, b in zip(*changed, strict=True)]
        result["fast"] = {"photos_changed": len(distances), "mean_pixel_distance": round(median(distances), 3)}
        if options.model:
            cosines = feature_cosines(options.model, *changed)
            result["fast"] |= {"cosine_median": round(median(cosines), 5), "cosine_least": round(min(cosines), 5)}
    write(options.json, result)


if __name__ == "__main__":
    main()

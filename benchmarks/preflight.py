"""Whether `patchstream benchmark` predicts what the following real run then does.

    python benchmarks/preflight.py PHOTOS --model FOLDER [--seconds 40] [--scale 5] [--rounds 3] [--only small]
        [--json F]

Three inputs, made from PHOTOS: small JPEGs, the same photos enlarged to 12 megapixels, and the small ones in tar shards
on a real S3 endpoint (moto). For each, the preflight and then a real job of `scale` times as many images as the
preflight's own rehearsal had, both through the command line, in turn for some rounds: the machine is shared, and its
speed differs by more from one minute to the next than prediction and truth may. Medians.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common import environment, median, write
from PIL import Image

_LARGE = (4000, 3000)
_LARGE_PHOTOS = 24
_SHARD_PHOTOS = 64


def small(photos: list[Path], folder: Path) -> str:
    """The photos at 500 pixels for the longer edge."""
    folder.mkdir()
    for photo in photos:
        with Image.open(photo) as image:
            picture = image.convert("RGB")
            picture.thumbnail((500, 500))
            picture.save(folder / f"{photo.stem}.jpg", quality=90)
    return str(folder)


def large(photos: list[Path], folder: Path) -> str:
    """Some of the photos at 12 megapixels."""
    folder.mkdir()
    for photo in photos[:_LARGE_PHOTOS]:
        with Image.open(photo) as image:
            image.convert("RGB").resize(_LARGE, Image.Resampling.BICUBIC).save(folder / f"{photo.stem}.jpg", quality=92)
    return str(folder)


def shards(small_folder: str) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of tar shards of the small photos."""
    files = sorted(Path(small_folder).iterdir())
    for number, start in enumerate(range(0, len(files), _SHARD_PHOTOS)):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            for file in files[start : start + _SHARD_PHOTOS]:
                tar.add(file, arcname=file.name)
        yield f"shard-{number:05d}.tar", data.getvalue()


@contextlib.contextmanager
def s3_shards(small_folder: str) -> Iterator[tuple[str, Mapping[str, str]]]:
    """A prefix with the shards on a server in a process of its own, and the environment that finds it."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from support.s3 import s3_server

    with tempfile.TemporaryDirectory() as logs, s3_server(log_dir=Path(logs)) as server:
        bucket = server.make_bucket()
        for name, data in shards(small_folder):
            server.put(bucket, f"shards/{name}", data)
        yield f"s3://{bucket}/shards", server.env


def command(env: Mapping[str, str], *arguments: str) -> dict[str, Any]:
    """What a patchstream command prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "jobs", *arguments, "--json"],
        stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **env},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(source: str, model: str, seconds: float, scale: float, rounds: int, env: Mapping[str, str]) -> dict[str, Any]:
    """Prediction and truth for one input: medians over the rounds."""
    found = [once(source, model, seconds, scale, env) for _ in range(rounds)]
    numbers = ("images", "predicted_images_per_s", "real_images_per_s", "predicted_over_real")
    medians = {name: median([item[name] for item in found]) for name in numbers}
    ratios = [item["predicted_over_real"] for item in found]
    return found[-1] | medians | {"ratios": ratios}


def once(source: str, model: str, seconds: float, scale: float, env: Mapping[str, str]) -> dict[str, Any]:
    """Prediction, then truth."""
    predicted = command(env, "benchmark", source, "--model", model, "--seconds", str(seconds))
    images = int(predicted["together_images"] * scale)
    repeats = -(-images // predicted["measured"]["listed"])
    with tempfile.TemporaryDirectory() as out:
        run = command(
            env, "embed", *[source] * repeats, "--model", model, "--out", f"{out}/o", "--limit", str(images),
            "--no-report",
        )  # fmt: skip
    real = run["attempt"]["images_per_s"]
    return {
        "images": run["images"],
        "predicted_images_per_s": predicted["predicted_images_per_s"],
        "real_images_per_s": real,
        "predicted_over_real": predicted["predicted_images_per_s"] / real,
        "bottleneck": predicted["bottleneck"],
        "advice": predicted["advice"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--scale", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=["small", "large", "shards"], default=["small", "large", "shards"])
    parser.add_argument("--json")
    options = parser.parse_args()
    before = environment()
    photos = sorted(path for path in options.photos.iterdir() if path.is_file())
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        small_folder = small(photos, Path(folder) / "small")
        large_folder = large(photos, Path(folder) / "large")
        arguments = (options.model, options.seconds, options.scale, options.rounds)
        if "small" in options.only:
            results["small JPEGs"] = check(small_folder, *arguments, {})
        if "large" in options.only:
            results["12 megapixels"] = check(large_folder, *arguments, {})
        if "shards" in options.only:
            with s3_shards(small_folder) as (source, env):
                results["tar shards on S3"] = check(source, *arguments, env)
    for name, found in results.items():
        print(f"{name:<18}{found['predicted_images_per_s']:>10.1f} predicted{found['real_images_per_s']:>10.1f} real"
              f"{found['predicted_over_real']:>8.2f}  {found['bottleneck']}")  # fmt: skip
    write(options.json, {"benchmark": "preflight", "environment": before, "model": Path(options.model).name,
                         "results": results})  # fmt: skip


if __name__ == "__main__":
    main()

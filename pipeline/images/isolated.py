"""Decode one image in a process of its own: slow, and safe from a decoder that crashes, hangs or eats the memory.

`python -m pipeline.images.isolated` reads a line of JSON and the file's bytes from standard input and writes a line
of JSON and the pixels to standard output.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.images.decode import DecodeSpec, ImageFacts, decode_into
from pipeline.images.formats import prepare_process
from pipeline.images.transform import Pixels
from schemas.errors import ImageError
from schemas.preprocessing import Preprocessing

# Deaths of whole workers after which a row is not even tried in isolation.
MAX_STRIKES = 4


def decode_isolated(data: bytes, out: Pixels, spec: DecodeSpec, strikes: int) -> ImageFacts:
    """Like `decode_into`, for an image at which `strikes` workers have died.

    Raises ImageError `DecoderCrashed` when the process dies at it as well.
    """
    if strikes >= MAX_STRIKES:
        raise _crashed(f"{strikes} workers died while they decoded this image", strikes)
    header = {**asdict(spec), "preprocessing": spec.preprocessing.model_dump()}
    command = [sys.executable, "-m", "pipeline.images.isolated"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    request = json.dumps(header).encode() + b"\n" + data
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, env=environment, timeout=2 * spec.limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise _crashed("a worker died and a second process hung while decoding this image", strikes + 1) from None
    if done.returncode != 0:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise _crashed(f"a worker died while decoding this image, and a second process did too ({how})", strikes + 1)
    reply, _, pixels = done.stdout.partition(b"\n")
    answer: dict[str, Any] = json.loads(reply)
    if "error" in answer:
        raise ImageError("decode", answer["error"], answer["message"], retryable=answer["retryable"])
    out[:] = np.frombuffer(pixels, np.uint8).reshape(out.shape)
    return ImageFacts(**answer)


def _crashed(message: str, strikes: int) -> ImageError:
    return ImageError("decode", "DecoderCrashed", f"{message}; it is not tried again", attempts=strikes)


def main() -> None:
    """The process of its own."""
    _be_the_first_to_go()
    header, _, data = sys.stdin.buffer.read().partition(b"\n")
    values = json.loads(header)
    spec = DecodeSpec(**{**values, "preprocessing": Preprocessing(**values["preprocessing"])})
    prepare_process()
    out = np.empty((*spec.preprocessing.output_size, 3), np.uint8)
    try:
        facts = decode_into(data, out, spec)
    except ImageError as error:
        reply = {"error": error.error, "message": error.message, "retryable": error.retryable}
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
    else:
        sys.stdout.buffer.write(json.dumps(asdict(facts)).encode() + b"\n" + out.tobytes())


def _be_the_first_to_go() -> None:
    """When the machine runs out of memory, the kernel shall take this process and not its parent."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        return  # not Linux, or not allowed: then the kernel chooses


if __name__ == "__main__":
    main()

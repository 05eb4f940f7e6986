"""What a client and an exported model agree on: names, shapes, and that it is the same computation."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pipeline.models import ModelInfo
from pipeline.predictors.batches import Wanted
from schemas.errors import SpecError
from schemas.redaction import redact

INPUT_NAME = "pixels"
LOGITS = "logits"
DEFAULT_PORT = 8001


class Address(NamedTuple):
    """Where a server is: `host:port` for gRPC, and whether through TLS."""

    target: str
    tls: bool
    host: str


class ServedModel(NamedTuple):
    """A model on a server that has been checked. `max_batch_size` is at least 1."""

    name: str
    dtype: str
    max_batch_size: int
    image_size: tuple[int, int]
    outputs: tuple[tuple[str, int], ...]


def parse_url(url: str) -> Address:
    """Address of `grpc://host:8001` or `grpcs://host:8001`. Raises SpecError for anything else."""
    wrong = SpecError(f"--triton-url {redact(url)}: expected grpc://HOST:PORT, or grpcs://HOST:PORT for TLS")
    try:
        parts = urlsplit(url)
        port = parts.port or DEFAULT_PORT
    except ValueError:  # brackets that do not close, a port that is no number or too large
        raise wrong from None
    if parts.scheme not in ("grpc", "grpcs") or not parts.hostname or parts.path.strip("/"):
        raise wrong
    if parts.username or parts.password:
        raise SpecError("--triton-url takes no user and password; send a token with --triton-header")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Address(f"{host}:{port}", parts.scheme == "grpcs", parts.hostname)


def default_model_name(info: ModelInfo) -> str:
    """Name that `export-triton` gives: the last part of the checkpoint's name, its size where that is not 224."""
    last = re.split(r"[/\\]", info.name.rstrip("/\\"))[-1]
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", last).strip("-.") or "model"
    height, width = info.image_size
    return slug if (height, width) == (224, 224) else f"{slug}-{height}x{width}"


def identity(info: ModelInfo) -> dict[str, str]:
    """Strings that are equal exactly where weights, preprocessing and read-out are the same."""
    preprocessing = info.preprocessing.model_dump_json()
    return {
        "digest": info.digest,
        "preprocessing": hashlib.sha256(preprocessing.encode()).hexdigest(),
        "pooled": info.pooled,
        "beit_final_norm": str(info.beit_final_norm).lower(),
    }


def check_model(
    config: Mapping[str, Any], info: ModelInfo, wanted: Wanted, name: str, dtype: str | None = None
) -> ServedModel:
    """What `config` (Triton's ModelConfig as JSON) serves, if it is the computation that the run asks for. Where
    `dtype` is None, any precision is.

    Raises SpecError naming all that differs: input, outputs, digest, preprocessing, precision.
    """
    found = {key: value.get("string_value", "") for key, value in config.get("parameters", {}).items()}
    problems = [
        f"{key}: the run needs {value}, the server has {found.get(key, 'nothing')}"
        for key, value in identity(info).items()
        if found.get(key) != value
    ]
    served = found.get("dtype", "float32")
    if dtype not in {None, served}:
        problems.append(f"dtype: the run needs {dtype}, the server has {served}")
    height, width = info.image_size
    problems += _differences("input", config.get("input", []), {INPUT_NAME: ("TYPE_UINT8", [height, width, 3])})
    outputs = wanted.widths
    if wanted.labels:
        outputs[LOGITS] = len(wanted.label_names)
    expected = {key: ("TYPE_FP32", [size]) for key, size in outputs.items()}
    problems += _differences("output", config.get("output", []), expected)
    if problems:
        raise SpecError(
            f"model {name} on the Triton server is not the one of --model {info.name}:\n  "
            + "\n  ".join(problems)
            + "\nExport this checkpoint with `patchstream export-triton`, or name another model with --triton-model"
        )
    batch = int(config.get("max_batch_size", 0))
    return ServedModel(name, served, max(1, batch), (height, width), tuple(outputs.items()))


def _differences(side: str, tensors: list[Any], expected: Mapping[str, tuple[str, list[int]]]) -> list[str]:
    served = {item["name"]: (item["data_type"], [int(size) for size in item["dims"]]) for item in tensors}
    problems = []
    for name, (kind, dims) in expected.items():
        if name not in served:
            problems.append(f"{side} {name}: not there, the server has {', '.join(sorted(served)) or 'none'}")
        elif served[name] != (kind, dims):
            there_kind, there_dims = served[name]
            problems.append(f"{side} {name}: the run needs {kind} {dims}, the server has {there_kind} {there_dims}")
    return problems

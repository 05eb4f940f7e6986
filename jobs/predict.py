"""`predict`: labels for the images of one JSON request on standard input, without Ray."""

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from jobs.options import AsForEmbed, Options, Revision, parse_options
from jobs.output import emit
from schemas.errors import SpecError


def predict(
    model: Annotated[str, typer.Option(help="A folder, an object-store prefix or a hub name.")],
    top_k: Annotated[int, typer.Option(min=1, help="How many labels an image, best first.")] = 5,
    label_file: AsForEmbed = None,
    image_size: AsForEmbed = None,
    revision: Revision = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16, on the CPU of this machine.")] = "auto",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for fetching one image, all tries together.")] = 60.0,
    storage_options: Options = None,
) -> int:
    """Label the images of {"input_data": [base64 or URL, …]} on standard input; prints [[{"label", "score"}, …], …]."""
    from pipeline.models import choose_dtype, inspect_model
    from pipeline.online import FORM, Settings, answer, parse_request
    from schemas.spec import FetchSpec
    from schemas.values import parse_image_size

    if sys.stdin.isatty():
        raise SpecError(f"predict reads {FORM} on standard input, and nothing is piped into it")
    items = parse_request(sys.stdin.buffer.read().decode("utf-8", errors="replace"))
    options = parse_options(storage_options)
    info = inspect_model(
        model,
        revision=revision,
        image_size=parse_image_size(image_size),
        label_file=label_file,
        storage_options=options,
    )
    precision = str(choose_dtype(_dtype(dtype), cuda=False)).removeprefix("torch.")
    answers = answer(info, items, Settings(top_k, precision, FetchSpec(timeout_s=timeout), options))
    emit(json.dumps(answers, ensure_ascii=False))
    failed = sum(isinstance(item, dict) for item in answers)
    if failed:
        emit(f"{failed:,} of {len(answers):,} images failed; each says why in its place", to_stderr=True)
    return 3 if failed and failed == len(answers) else 0


def _dtype(text: str) -> Any:
    known = ("auto", "float32", "bfloat16")
    if text not in known:
        raise SpecError(f"--dtype {text}: choose one of {', '.join(known)}")
    return text


COMMANDS: dict[str, Callable[..., Any]] = {"predict": predict}

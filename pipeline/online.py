"""Labels for a few images at once, without Ray: base64 or addresses in, labels out.

    {"input_data": ["/9j/4AAQ…", "https://host/cat.jpg"]}   →   [[{"label": "tabby", "score": 0.91}, …], …]

An image that cannot be fetched or decoded has, in its place, an object instead of a list:
`{"error": "NotFound", "stage": "fetch", "message": "…"}`, with the names that `failures/` uses.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.images.decode import DecodeSpec, decode_into
from pipeline.images.fetch import fetch_rows
from pipeline.images.formats import prepare_process
from pipeline.images.transform import Pixels
from pipeline.models import ModelInfo, require_classes
from pipeline.predictors.batches import Wanted
from pipeline.storage import redact
from schemas.errors import ImageError, SpecError
from schemas.spec import FetchSpec
from schemas.tables import manifest_schema

FORM = '{"input_data": [base64 or URL, …]}'
BATCH_IMAGES = 8

Answer = list[dict[str, Any]] | dict[str, str]


class Settings(NamedTuple):
    """How images are fetched and scored. `dtype` is resolved, never `auto`."""

    top_k: int = 5
    dtype: str = "float32"
    fetch: FetchSpec = FetchSpec()
    storage_options: Mapping[str, Any] = {}


def parse_request(text: str) -> list[str]:
    """The images of a request. Raises SpecError saying what is not as FORM says."""
    try:
        request = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"standard input is not JSON ({error}); expected {FORM}") from error
    if not isinstance(request, dict) or "input_data" not in request:
        found = (
            f"an object with {', '.join(request) or 'no keys'}" if isinstance(request, dict) else type(request).__name__
        )
        raise SpecError(f"standard input holds {found:.200}; expected {FORM}")
    items = request["input_data"]
    if not isinstance(items, list):
        raise SpecError(f"input_data is {type(items).__name__}, not a list; expected {FORM}")
    odd = next((index for index, item in enumerate(items) if not isinstance(item, str)), None)
    if odd is not None:
        raise SpecError(f"input_data[{odd}] is {type(items[odd]).__name__}, not text; expected {FORM}")
    return items


def answer(info: ModelInfo, items: list[str], settings: Settings) -> list[Answer]:
    """For each item its best labels with scores, best first, or why there are none.

    Raises SpecError for a model without a classifier, or trained for regression.
    """
    if not info.num_labels:
        raise SpecError(f"predict gives labels, but {info.without_classifier}; use a fine-tuned checkpoint")
    require_classes(info)
    answers: list[Answer] = [[] for _ in items]
    pictures, places = [], []
    for place, result in enumerate(_pixels(info, items, settings)):
        if isinstance(result, ImageError):
            answers[place] = {"error": result.error, "stage": result.stage, "message": redact(result.message)}
        else:
            pictures.append(result)
            places.append(place)
    if pictures:
        for place, labels in zip(places, _labels(info, np.stack(pictures), settings), strict=True):
            answers[place] = labels
    return answers


def _labels(info: ModelInfo, pixels: np.ndarray, settings: Settings) -> Iterator[Answer]:
    from pipeline.predictors.torch_predictor import TorchPredictor

    top = min(settings.top_k, info.num_labels)
    wanted = Wanted((), (), "float32", top, info.labels, info.multi_label)
    batch = min(BATCH_IMAGES, len(pixels))
    predictor = TorchPredictor(
        info, wanted, dtype=settings.dtype, batch_size=batch, storage_options=settings.storage_options
    )
    found = predictor.predict(pixels)
    assert found.scores is not None
    assert found.indices is not None
    for scores, indices in zip(found.scores, found.indices, strict=True):
        if not np.isfinite(scores).all():
            yield {"error": "NotFinite", "stage": "predict", "message": "the model gave NaN or infinity for this image"}
            continue
        yield [
            {"label": info.labels[index], "score": float(score)} for index, score in zip(indices, scores, strict=True)
        ]


def _pixels(info: ModelInfo, items: list[str], settings: Settings) -> Iterator[Pixels | ImageError]:
    """uint8 (H, W, 3) of each item, in order."""
    items = [item.strip() for item in items]
    web = fetched([item for item in items if is_address(item)], settings.fetch, settings.storage_options)
    files = (next(web) if is_address(item) else _decoded_text(item, settings.fetch.max_bytes) for item in items)
    return pixels(files, DecodeSpec(info.preprocessing, "exact", settings.fetch.max_pixels))


def pixels(files: Iterable[bytes | ImageError], spec: DecodeSpec) -> Iterator[Pixels | ImageError]:
    """uint8 (H, W, 3) of each file, in order, or why there are none."""
    prepare_process()
    for data in files:
        if isinstance(data, ImageError):
            yield data
            continue
        out = np.empty((*spec.preprocessing.output_size, 3), np.uint8)
        try:
            decode_into(data, out, spec)
            yield out
        except ImageError as error:
            yield error


def is_address(item: str) -> bool:
    """Whether an item is a URL: base64 has no colon."""
    return "://" in item and not item.startswith("data:")


def fetched(urls: list[str], fetch: FetchSpec, storage_options: Mapping[str, Any]) -> Iterator[bytes | ImageError]:
    """The bytes of the file at each address, in order, or why there are none."""
    # JSON may spell half of a surrogate pair, which is no text and has no bytes.
    rows = [{"row": row, "uri": url.encode("utf-8", "replace").decode()} for row, url in enumerate(urls)]
    manifest = pa.Table.from_pylist(rows, schema=manifest_schema([]))
    for item in fetch_rows(manifest, fetch=fetch, image_column="image", storage_options=storage_options):
        yield item.result


def _decoded_text(item: str, max_bytes: int) -> bytes | ImageError:
    """Bytes of base64 text, plain or in a `data:` address, of either alphabet, padded or not."""
    text = item.partition(",")[2] if item.startswith("data:") else item
    if len(text) * 3 // 4 > max_bytes:
        return ImageError("fetch", "TooManyBytes", f"about {len(text) * 3 // 4:,} bytes; the limit is {max_bytes:,}")
    compact = "".join(text.split()).translate(str.maketrans("-_", "+/"))
    if len(compact) % 4 != 1:  # which no bytes give
        compact += "=" * (-len(compact) % 4)
    try:
        data = base64.b64decode(compact, validate=True)
    except (binascii.Error, ValueError) as error:
        shown = f"{item[:40]}…" if len(item) > 40 else item
        return ImageError("fetch", "NotBase64", f"{shown!r} is neither base64 ({error}) nor an address with ://")
    return data if data else ImageError("fetch", "NoBytes", "an empty text holds no image")

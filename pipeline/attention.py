"""Attention maps of some images of a run, after the run: overlays and a page that shows them.

The pictures are read again through the manifest, so the main job does nothing for it; the model runs here, in float32.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.addresses import absolute, join
from pipeline.images.stage import Reading, fetch_and_decode
from pipeline.models import ModelInfo, inspect_model
from pipeline.models.attention import Rollout, rollout_origin
from pipeline.opening import reopen
from pipeline.predictors.batches import pixels_of
from pipeline.record import require_record
from pipeline.report.attention_page import AttentionPicture, render_attention_page
from pipeline.report.lookup import RowLookup
from pipeline.report.overlay import overlay_png
from pipeline.report.run import open_run
from pipeline.sinks import intervals
from pipeline.sinks.intervals import Spans
from pipeline.sinks.ledger import read_ledger
from pipeline.sources.manifest import read_rows
from pipeline.storage import filesystem, put_bytes, redact
from schemas.errors import SpecError
from schemas.spec import JobSpec

_BATCH_IMAGES = 16
_ORIGINS = {"cls": "the CLS token", "mean": "the mean of the patch tokens"}


class AttentionMaps(NamedTuple):
    """Where overlays go, of how many images at most."""

    directory: str
    images: int


def check_attention(spec: JobSpec, maps: AttentionMaps) -> ModelInfo:
    """The model whose attention is asked for. Raises SpecError where there is none to show."""
    if spec.backend == "null":
        raise SpecError("--attention-maps: --backend null runs no model")
    if maps.images < 1:
        raise SpecError(f"--attention-images {maps.images}: at least 1")
    info = inspect_model(
        spec.model,
        revision=spec.revision,
        image_size=spec.image_size,
        beit_final_norm=spec.beit_final_norm,
        storage_options=spec.storage_options,
    )
    if info.network.network == "mixer":
        raise SpecError(f"--attention-maps: {spec.model} is an MLP-Mixer, which has no attention")
    return info


def write_attention_maps(spec: JobSpec, info: ModelInfo, maps: AttentionMaps) -> str:
    """Write an overlay for up to `maps.images` images of the run in `spec.out`, evenly spread over its rows, and
    `index.html`; returns the page's address.

    A picture that can no longer be read is named on the page. Raises OutputError where the run or the folder fails.
    """
    out = absolute(spec.out)
    fs, folder = filesystem(absolute(maps.directory), spec.storage_options)
    rows = spread(read_ledger(out, spec.storage_options).images, maps.images)
    labels = RowLookup(open_run(out, spec.storage_options), "images", ["row", "labels"]).get(rows.tolist())
    rollout = Rollout(info, spec.storage_options)
    pictures = []
    for decoded in _decoded(out, spec, info, rows):
        pixels = iter(pixels_of(decoded, *info.image_size))
        for item in decoded.select(["row", "uri", "message"]).to_pylist():
            best = (labels.get(item["row"], {}).get("labels") or [{}])[0]
            picture = AttentionPicture(item["row"], redact(item["uri"]), best.get("label"), best.get("score"))
            if item["message"] is None:
                image = next(pixels)
                picture = picture._replace(file=f"row-{picture.row:012d}.png")
                put_bytes(fs, join(folder, str(picture.file)), overlay_png(image, rollout(image)))
            pictures.append(picture._replace(reason=item["message"] or ""))
    page = render_attention_page(_facts(out, info), pictures, _ORIGINS[rollout_origin(info.network)])
    put_bytes(fs, join(folder, "index.html"), page.encode())
    return join(maps.directory, "index.html")


def spread(spans: Spans, count: int) -> npt.NDArray[np.int64]:
    """Up to `count` of the rows in `spans`, evenly spread, ascending."""
    total = intervals.count(spans)
    positions = np.unique(np.linspace(0, max(0, total - 1), min(count, total)).round().astype(np.int64))
    before = np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0])])
    index = np.searchsorted(before, positions, "right") - 1
    return np.asarray(spans[index, 0] + positions - before[index], np.int64)


def _decoded(out: str, spec: JobSpec, info: ModelInfo, rows: npt.NDArray[np.int64]) -> Iterator[pa.Table]:
    opened = reopen(out, require_record(out, spec.storage_options), spec.storage_options)
    manifest = list(read_rows(out, opened.parts, intervals.from_rows(rows), spec.storage_options))
    if manifest:
        yield from fetch_and_decode(
            pa.concat_tables(manifest), Reading.of(spec, info.preprocessing), batch_rows=_BATCH_IMAGES
        )


def _facts(out: str, info: ModelInfo) -> list[tuple[str, str]]:
    net = info.network
    rows, columns = net.grid(info.image_size)
    return [
        ("model", redact(info.name)),
        ("run", redact(out)),
        ("patches", f"{rows} × {columns} of {net.patch_size[0]} × {net.patch_size[1]} pixels"),
        ("layers", f"{net.depth}, {net.heads} heads each"),
    ]

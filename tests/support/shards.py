"""Small tar shards of grey pictures, their manifests, and what came of them."""

import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from support.manifests import manifest_of

from pipeline.sources.manifest import read_sources
from schemas.spec import build_spec


def png(shade: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A picture all of one grey."""
    file = io.BytesIO()
    Image.new("L", size, shade).save(file, "PNG")
    return file.getvalue()


def make_tar(path: Path, payloads: Iterable[bytes]) -> list[tarfile.TarInfo]:
    """A shard of these pictures, each with a sidecar; returns the pictures' members."""
    pairs = ((f"{n:04d}.png", f"{n:04d}.json", payload) for n, payload in enumerate(payloads))
    members = {name: data for png, text, data in pairs for name, data in ((png, data), (text, b'{"caption": "x"}'))}
    return [member for member in make_named_tar(path, members) if member.name.endswith(".png")]


def make_named_tar(path: Path, members: Mapping[str, bytes], **options: Any) -> list[tarfile.TarInfo]:
    """A shard of these members; `options` are those of `tarfile.open`."""
    with tarfile.open(path, "w", **options) as shard:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    with tarfile.open(path) as shard:
        return shard.getmembers()


def tar_manifest(url: str, members: Sequence[tarfile.TarInfo], **columns: Sequence[Any]) -> pa.Table:
    """The manifest of these members of a shard."""
    return manifest_of(
        [f"{url}#{member.name}" for member in members],
        container=[url] * len(members),
        offset=[member.offset_data for member in members],
        length=[member.size for member in members],
        size=[member.size for member in members],
        **columns,
    )


def listed(source: str, storage_options: Mapping[str, Any] | None = None) -> pa.Table:
    """The manifest of a source, as a run freezes it."""
    spec = build_spec({"sources": [source], "model": "m", "out": "/o", "storage_options": storage_options or {}})
    table = pa.concat_tables(read_sources(spec))
    return table.add_column(0, "row", pa.array(range(len(table)), pa.int64()))


def shades(table: pa.Table) -> list[int | None]:
    """The first value of each decoded picture, None where there is none."""
    return [pixels[0] if pixels else None for pixels in table["pixels"].to_pylist()]

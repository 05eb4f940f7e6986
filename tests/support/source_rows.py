"""What the tests of sources share: files to list, tables to read, and all manifest rows of some sources."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.columns import concatenated
from pipeline.sources.listing import list_source
from pipeline.sources.manifest import read_sources
from schemas.spec import JobSpec, build_spec

NAMES = ["a.jpg", "b.png", ".hidden.jpg", "cats/c.jpg", "cats/deep/d.jpg", "dogs/e[1].jpg", "caté ü#?%41.jpg"]
ROWS = [{"uri": "s3://b/1.jpg", "label": "cat", "score": 0.5}, {"uri": "s3://b/2.jpg", "label": "dog", "score": 2.0}]
# The columns of a manifest in front of the user's, without `row`.
FIXED = ["uri", "container", "offset", "length", "size", "etag", "replaces"]


def tree(folder: Path, names: list[str] = NAMES) -> Path:
    """A small file for each name below `folder`."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def listed(source: str | Path, options: dict[str, Any] | None = None, below: str | Path = "") -> list[str]:
    """Addresses, those below `below` cut short."""
    cut = f"{below}/" if below else ""
    return [entry.uri.removeprefix(cut) for entry in list_source(str(source), options or {})]


def spec_of(*sources: str | Path, out: str = "/nowhere/out", **values: Any) -> JobSpec:
    """A job over `sources`; neither its model nor its output is looked at."""
    return build_spec({"sources": [str(source) for source in sources], "model": "m", "out": out, **values})


def rows_of(spec: JobSpec) -> list[str]:
    """Addresses of all manifest rows."""
    return [uri for table in read_sources(spec) for uri in table["uri"].to_pylist()]


def read(*sources: str | Path, **values: Any) -> pa.Table:
    """All rows as one table."""
    return concatenated(list(read_sources(spec_of(*sources, **values))))


def uris(*sources: str | Path, **values: Any) -> list[str]:
    found: list[str] = read(*sources, **values)["uri"].to_pylist()
    return found


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """`rows` in the form that the suffix says."""
    kind = path.suffix.lower() if path.suffix != ".gz" else Path(path.stem).suffix
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    mark = {".csv": ",", ".tsv": "\t"}.get(kind)
    lines = [json.dumps(row) for row in rows]
    if mark:
        lines = [mark.join(rows[0]), *(mark.join(str(value) for value in row.values()) for row in rows)]
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path

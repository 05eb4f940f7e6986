"""A small run with everything a page can show: pictures of every kind of source, failures, attempts, groups."""

import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from support.runs import RunContent, clustered, jpeg, write_run

from schemas.attempt import AttemptRecord, StageSeconds

HOSTILE_NAMES = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "javascript:alert(3)",
    "</title></style></script><svg onload=alert(4)>",
    "{{ 7 * 7 }} {% raw %} ${7*7} &amp; &#60;b&#62;",
    "'; onmouseover='alert(5)",
)
LABELS = ("red", "green", "blue", *HOSTILE_NAMES)
_COLOURS = ((200, 30, 30), (30, 160, 60), (40, 60, 200))


@dataclass
class Album:
    """What a run is made of. `labels[i]` is an index into LABELS, for the i-th image (not row)."""

    folder: Path
    count: int = 60
    failed: dict[int, str] = field(default_factory=lambda: {5: "Truncated", 11: "NotAnImage", 12: "NotAnImage"})
    dim: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(self.seed)
        self.rows = [row for row in range(self.count) if row not in self.failed]
        self.labels = rng.integers(0, len(LABELS), len(self.rows))
        self.scores = rng.uniform(0.2, 1.0, len(self.rows)).astype(np.float32)
        centres = rng.standard_normal((len(LABELS), self.dim))
        noise = rng.standard_normal((len(self.rows), self.dim))
        self.features = (4 * centres[self.labels] + noise).astype(np.float32)

    def picture_files(self) -> list[str]:
        """Write one JPEG a row, some under hostile names, and give their paths."""
        paths = []
        for row in range(self.count):
            odd = HOSTILE_NAMES[row].replace("/", "∕") if row < len(HOSTILE_NAMES) else ""
            path = self.folder / f"{row:04d}{odd}.jpg"
            path.write_bytes(jpeg(_COLOURS[row % 3], (64 + row, 48)))
            paths.append(str(path))
        return paths

    def content(self) -> RunContent:
        """The run's content, to be changed with `dataclasses.replace` before it is written."""
        scored = zip(self.labels.tolist(), self.scores.tolist(), strict=True)
        return RunContent(
            features={"cls": self.features},
            uris=self.picture_files(),
            labels=[[(label, LABELS[label], score), (1, "second best", 0.01)] for label, score in scored],
            failed=self.failed,
            sizes=[(64 + row, 48) for row in self.rows],
            row_group_rows=16,
        )

    def write(self, **changes: Any) -> Path:
        """Write the run and give its directory."""
        return write_run(self.folder / "out", replace(self.content(), **changes))


def add_attempts(run: Path) -> None:
    """Two attempts, the first interrupted."""
    (run / "attempts").mkdir()
    for number, status, images in ((1, "interrupted", 21), (2, "done", 37)):
        record = AttemptRecord(
            attempt=number,
            shard_index=0,
            shard_count=1,
            started=f"2026-01-0{number}T10:00:00+00:00",
            host="here",
            pid=1,
            status=status,
            images=images,
            failures=number,
            wall_s=10.0,
            images_per_s=images / 8,
            startup_s=2.0,
            bottleneck="predict",
            stage_seconds=StageSeconds(fetch=1, decode=4, predict=5, write=0.5),
        )
        (run / "attempts" / f"{number}.json").write_text(record.model_dump_json())


def add_clusters(run: Path, rows: Sequence[int], clusters: Sequence[int], name: str = "colours") -> None:
    """A clustering in which the distance grows with the row."""
    folder = run / "clusters" / name
    folder.mkdir(parents=True)
    folder.with_name(f"{name}.json").write_text("{}")
    distances = pa.array([row / 100 for row in rows], pa.float32())
    table = {"row": pa.array(rows, pa.int64()), "cluster": pa.array(clusters, pa.int32()), "distance": distances}
    pq.write_table(pa.table(table), folder / "part.parquet")


def add_duplicates(run: Path, groups: Sequence[Sequence[int]], name: str = "near") -> None:
    """Groups of rows; the second of each is the one to keep."""
    folder = run / "duplicates" / name
    folder.mkdir(parents=True)
    folder.with_name(f"{name}.json").write_text("{}")
    records = [
        {"row": row, "group": group, "keep": place == 1, "score": 0.5 if place == 1 else 0.99 - place / 100}
        for group, rows in enumerate(groups)
        for place, row in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(records), folder / "part.parquet")


def full_run(album: Album) -> Path:
    """A run with attempts, a clustering by label and two groups of near-duplicates."""
    run = album.write()
    add_attempts(run)
    add_clusters(run, album.rows, album.labels.tolist())
    add_duplicates(run, [album.rows[:2], album.rows[10:15]])
    return run


def big_run(folder: Path, count: int, dim: int, group_rows: int = 1024) -> Path:
    """A run of `count` rows without pictures."""
    labels = [[(row % 7, f"label {row % 7}", 0.5)] for row in range(count)]
    return write_run(folder, RunContent({"cls": clustered(count, dim, 7)}, labels=labels, row_group_rows=group_rows))


def damage_column(part: Path, name: str) -> None:
    """Zeros where the first page of a column begins; the footer stays whole."""
    group = pq.ParquetFile(part).metadata.row_group(0)
    column = next(found for found in map(group.column, range(group.num_columns)) if found.path_in_schema == name)
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(part.read_bytes())
    content[start : start + 40] = bytes(40)
    part.write_bytes(content)


def tar_of(path: Path, members: dict[str, bytes]) -> list[tuple[int, int]]:
    """Write a tar and give offset and length of each member's bytes."""
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as archive:
        return [(member.offset_data, member.size) for member in archive]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of a picture file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


Nearest = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def nearest_by_cosine(rows: Sequence[int], features: np.ndarray) -> Nearest:
    """Exact search in memory."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)

    def nearest(vector: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = unit @ (vector / np.linalg.norm(vector))
        best = np.argsort(-scores)[:k]
        return np.asarray(rows)[best], scores[best]

    return nearest

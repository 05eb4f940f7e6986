"""Decoded rows to an Arrow table whose pixels lie end to end in one buffer."""

from array import array
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.images.decode import ImageFacts
from pipeline.images.transform import Pixels
from schemas.errors import ImageError
from schemas.tables import FAILURE_FIELDS, IMAGE_FACT_FIELDS, decoded_schema, user_fields

MAX_PIXEL_BYTES = 2**31 - 1  # 32-bit offsets of Arrow's binary type


class BatchBuilder:
    """Collects the rows of one output table. Pixels are decoded straight into the buffer that travels."""

    def __init__(self, capacity: int, height: int, width: int) -> None:
        self._shape = (height, width, 3)
        self._image_bytes = height * width * 3
        self._buffer = pa.allocate_buffer(capacity * self._image_bytes)
        self._pixels = np.frombuffer(self._buffer, dtype=np.uint8)
        self._offsets = array("i", [0])
        self._facts: list[ImageFacts | None] = []
        self._errors: list[ImageError | None] = []
        self._sha256: list[str | None] = []
        self._fetch_s = array("f")
        self._decode_s = array("f")

    def __len__(self) -> int:
        return len(self._facts)

    def slot(self) -> Pixels:
        """Where the next row's pixels go: uint8 (height, width, 3), uninitialised."""
        start = self._offsets[-1]
        return self._pixels[start : start + self._image_bytes].reshape(self._shape)

    def add(self, result: ImageFacts | ImageError, sha256: str | None, fetch_s: float, decode_s: float) -> None:
        """Close a row. On ImageFacts, `slot()` has been filled; on ImageError it is used for the next row."""
        failed = isinstance(result, ImageError)
        self._offsets.append(self._offsets[-1] + (0 if failed else self._image_bytes))
        self._facts.append(None if isinstance(result, ImageError) else result)
        self._errors.append(result if isinstance(result, ImageError) else None)
        self._sha256.append(sha256)
        self._fetch_s.append(fetch_s)
        self._decode_s.append(decode_s)

    def table(self, manifest: pa.Table) -> pa.Table:
        """The finished table; `manifest` holds the same rows and lends `row`, `uri` and the user's columns."""
        user = user_fields(manifest.schema)
        columns = {
            "row": manifest.column("row"),
            "uri": manifest.column("uri"),
            "pixels": self._pixel_column(),
            **self._fact_columns(),
            **self._failure_columns(),
            "fetch_s": pa.array(self._fetch_s, pa.float32()),
            "decode_s": pa.array(self._decode_s, pa.float32()),
            "predict_s": pa.nulls(len(self), pa.float32()),
            **{field.name: manifest.column(field.name) for field in user},
        }
        schema = decoded_schema(user)
        return pa.table([columns[name] for name in schema.names], schema=schema)

    def _pixel_column(self) -> pa.Array:
        valid = pa.array([error is None for error in self._errors], pa.bool_())
        buffers = [
            valid.buffers()[1],
            pa.py_buffer(self._offsets.tobytes()),
            self._buffer.slice(0, self._offsets[-1]),
        ]
        return pa.Array.from_buffers(pa.binary(), len(self), buffers)

    def _fact_columns(self) -> dict[str, pa.Array]:
        values: dict[str, list[Any]] = {
            name: [getattr(facts, name) if facts else None for facts in self._facts]
            for name in ("width", "height", "format")
        }
        values["sha256"] = self._sha256
        return {field.name: pa.array(values[field.name], field.type) for field in IMAGE_FACT_FIELDS}

    def _failure_columns(self) -> dict[str, pa.Array]:
        return {
            field.name: pa.array([getattr(error, field.name) if error else None for error in self._errors], field.type)
            for field in FAILURE_FIELDS
        }

"""Arrow schemas of every table, on disk and between stages.

    manifest  ─▶  decoded  ─▶  predicted  ─▶  images | failures
    (on disk)     (Ray)        (Ray)          (on disk)

Columns of the user's own tables ride along behind the fixed ones in `manifest`, `decoded`, `predicted` and
`images`. `SCHEMA_VERSION` goes into the metadata of each Parquet file under the key `patchstream`.
"""

from collections.abc import Iterable, Mapping

import pyarrow as pa

from schemas.spec import FEATURE_NAMES

SCHEMA_VERSION = 1
METADATA_KEY = b"patchstream"
# There while parts are put in the place of others: in between, rows stand in no part that can be seen.
SWAP_PLAN = "_swap/plan.json"

LABEL = pa.struct([("index", pa.int32()), ("label", pa.string()), ("score", pa.float32())])

# One row per image, frozen when a run starts. `uri` names the image. An image inside a tar or a Parquet table
# lives in `container`: in a tar at bytes [offset, offset + length), in a table (`length` null) at row `offset`.
# `replaces` is the row of an older version of the same object, which `--update` found changed.
MANIFEST_FIELDS = [
    pa.field("row", pa.int64(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    pa.field("container", pa.string()),
    pa.field("offset", pa.int64()),
    pa.field("length", pa.int64()),
    pa.field("size", pa.int64()),
    pa.field("etag", pa.string()),
    pa.field("replaces", pa.int64()),
]

# Set on a row that failed, null on one that did not.
FAILURE_FIELDS = [
    pa.field("stage", pa.string()),
    pa.field("error", pa.string()),
    pa.field("message", pa.string()),
    pa.field("attempts", pa.int32()),
    pa.field("retryable", pa.bool_()),
]

# Size as a viewer shows it (after EXIF orientation), Pillow's name of the format, SHA-256 of the file's bytes.
IMAGE_FACT_FIELDS = [
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("format", pa.string()),
    pa.field("sha256", pa.string()),
]

# Seconds of work, shared out over the rows of a batch. They feed the report and never reach the disk.
TIMING_FIELDS = [
    pa.field("fetch_s", pa.float32()),
    pa.field("decode_s", pa.float32()),
    pa.field("predict_s", pa.float32()),
]

ROW_FIELDS = [pa.field("row", pa.int64(), nullable=False), pa.field("uri", pa.string(), nullable=False)]

# uint8 H×W×3, row-major, null on a failed row. All rows of a run have the same H×W, so the values of a batch
# lie end to end in one buffer.
PIXELS_FIELD = pa.field("pixels", pa.binary())

FAILURES_SCHEMA = pa.schema([*ROW_FIELDS, *FAILURE_FIELDS])

_FIXED_NAMES = frozenset(
    field.name
    for field in [
        *MANIFEST_FIELDS,
        *FAILURE_FIELDS,
        *IMAGE_FACT_FIELDS,
        *TIMING_FIELDS,
        PIXELS_FIELD,
    ]
) | {*FEATURE_NAMES, "labels"}

# Length of a vector or of a list of tokens; (patches, width) of patch features.
FeatureSize = int | tuple[int, int]


def user_column_name(name: str) -> str:
    """Name under which a column of the user's table rides along: its own, or `user_<name>` where we use it."""
    return f"user_{name}" if name in _FIXED_NAMES else name


def manifest_schema(user_fields: list[pa.Field]) -> pa.Schema:
    """Schema of `manifest/*.parquet`."""
    return pa.schema([*MANIFEST_FIELDS, *user_fields])


def user_fields(schema: pa.Schema) -> list[pa.Field]:
    """The user's own columns in a manifest, decoded, predicted or images schema."""
    return [field for field in schema if field.name not in _FIXED_NAMES]


def decoded_schema(user: list[pa.Field]) -> pa.Schema:
    """What `images.stage` hands to a predictor: uint8 pixels, or why there are none."""
    return pa.schema([*ROW_FIELDS, PIXELS_FIELD, *IMAGE_FACT_FIELDS, *FAILURE_FIELDS, *TIMING_FIELDS, *user])


def feature_field(name: str, dim: int, dtype: pa.DataType) -> pa.Field:
    """`cls` or `pooled`: a fixed-size list of `dim` floats."""
    return pa.field(name, pa.list_(pa.field("item", dtype, nullable=False), dim))


def patches_field(patches: int, width: int) -> pa.Field:
    """`patches`: for each patch, row by row from the top left, `width` float16."""
    vector = pa.list_(pa.field("item", pa.float16(), nullable=False), width)
    return pa.field("patches", pa.list_(pa.field("item", vector, nullable=False), patches))


def output_fields(features: Mapping[str, FeatureSize], feature_dtype: str, labels: bool) -> list[pa.Field]:
    """Feature fields (name → size) in the order of `features`, then `labels` where there are any.

    `feature_dtype` is that of the vectors; patches are float16 and visual tokens int32 in any case.
    """
    kind = pa.float16() if feature_dtype == "float16" else pa.float32()
    fields = []
    for name, size in features.items():
        if isinstance(size, tuple):
            fields.append(patches_field(*size))
        else:
            fields.append(feature_field(name, size, pa.int32() if name == "visual_tokens" else kind))
    return fields + ([pa.field("labels", pa.list_(LABEL))] if labels else [])


def feature_bytes(fields: Iterable[pa.Field]) -> int:
    """Bytes that the fixed-size lists among `fields` take in a row."""
    total = 0
    for field in fields:
        count, kind = 1, field.type
        while pa.types.is_fixed_size_list(kind):
            count, kind = count * kind.list_size, kind.value_type
        total += count * kind.bit_width // 8 if kind is not field.type else 0
    return total


def predicted_schema(outputs: list[pa.Field], user: list[pa.Field]) -> pa.Schema:
    """What a predictor hands to the sink. `outputs` are the feature and label fields."""
    return pa.schema([*ROW_FIELDS, *outputs, *IMAGE_FACT_FIELDS, *FAILURE_FIELDS, *TIMING_FIELDS, *user])


def images_schema(outputs: list[pa.Field], user: list[pa.Field]) -> pa.Schema:
    """Schema of `images/*.parquet`."""
    return pa.schema([*ROW_FIELDS, *outputs, *IMAGE_FACT_FIELDS, *user])

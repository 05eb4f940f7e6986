"""How the columns of a part are written: floats as they are, everything else compressed."""

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.encoding import encode
from schemas.tables import feature_field, patches_field


def test_a_column_of_the_users_is_compressed_whatever_its_name() -> None:
    features = [feature_field("cls", 2, pa.float32()), patches_field(3, 2)]
    schema = pa.schema([pa.field("row", pa.int64()), *features, pa.field("cls.note", pa.string())])
    rows = [{"row": row, "cls": [0.0, 1.0], "patches": [[0.0, 1.0]] * 3, "cls.note": "n"} for row in range(4)]
    group = pq.ParquetFile(pa.BufferReader(encode(pa.Table.from_pylist(rows, schema), b"{}"))).metadata.row_group(0)
    found = {column.path_in_schema: column.compression for column in map(group.column, range(group.num_columns))}
    assert {path.partition(".list")[0]: kind for path, kind in found.items()} == {
        "row": "ZSTD", "cls": "UNCOMPRESSED", "patches": "UNCOMPRESSED", "cls.note": "ZSTD",
    }  # fmt: skip

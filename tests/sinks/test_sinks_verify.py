"""`verify` before a store that does not let parts be read: nothing is said of them, least of all that they may go."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.faults import Rule
from support.flaky_proxy import FlakyProxy
from support.runs import RunContent, run_record, write_run

from pipeline.sinks import intervals
from pipeline.sinks.ledger import read_ledger
from pipeline.sinks.parts import list_parts
from pipeline.sinks.verify import verify
from pipeline.storage import filesystem
from schemas.errors import OutputError

# botocore would wait longer and longer, five times.
ONCE = {"config_kwargs": {"retries": {"max_attempts": 0}}}


@pytest.mark.parametrize("gaps", [True, False])
@pytest.mark.parametrize(
    ("store", "more", "rule", "said"),
    [
        ("s3", {}, {"status": 400, "code": "ExpiredToken"}, "PermissionError: ExpiredToken"),
        ("s3", ONCE, {"status": 503, "code": "SlowDown"}, r"OSError: \[Errno \d+\] SlowDown"),
        ("gcs", {}, {"status": 403}, "OSError: Forbidden"),
        ("gcs", {}, {"status": 401}, "HttpError: "),
    ],
)
def test_a_part_that_the_store_does_not_hand_out_is_not_called_damaged(
    tmp_path: Path, store: str, more: dict[str, Any], rule: dict[str, Any], said: str, gaps: bool,
    flaky_proxy: Callable[..., FlakyProxy[Any]], request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    server = request.getfixturevalue(f"{store}_server")
    content = RunContent({"cls": np.ones((8, 4), np.float32)}, failed={1: "Truncated"})
    run = write_run(tmp_path, content)
    parts = list_parts(*filesystem(str(run), {}))
    (part,) = (found for found in parts if found.folder == "images" and found.dense != gaps)
    schema = pq.read_schema(run / part.path).remove_metadata()
    proxy = flaky_proxy(server)
    url, options = server.upload(run, server.make_bucket(), "out"), proxy.server.storage_options | more
    assert part.path not in str(verify(url, run_record(content), intervals.EMPTY, schema, options).problems)

    proxy.control.set_rules(Rule("status", path=f"*{part.name}*", methods=("GET",), **rule))
    readers: list[Callable[[], object]] = [lambda: verify(url, run_record(content), intervals.EMPTY, schema, options)]
    readers += [lambda: read_ledger(url, options)] * gaps
    for read in readers:
        with pytest.raises(OutputError, match=rf"cannot read \S*{part.name}: {said}.*Check the address") as refused:
            read()
        assert "delete" not in str(refused.value)

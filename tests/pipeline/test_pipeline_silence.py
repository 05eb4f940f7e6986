"""A store whose connections fall silent: what is asked is asked again, and no job waits for ever."""

from collections.abc import Callable
from typing import Any

import pytest
from support.faults import WRITES, Rule
from support.flaky_proxy import FlakyProxy
from support.gcs import GcsServer
from support.source_rows import listed

from pipeline import storage
from pipeline.storage import create_bytes, filesystem, put_bytes, read_json
from schemas.errors import OutputError

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def silent(
    gcs_server: GcsServer, flaky_proxy: Callable[..., FlakyProxy[Any]], monkeypatch: pytest.MonkeyPatch
) -> FlakyProxy[Any]:
    """Each request is answered when it comes for the second time."""
    monkeypatch.setattr(storage, "_SILENT_S", 1.0)
    return flaky_proxy(gcs_server, [Rule("stall", first=1)])


def test_a_listing_goes_on(gcs_server: GcsServer, silent: FlakyProxy[Any]) -> None:
    url = gcs_server.put(gcs_server.make_bucket(), "in/1.jpg", b"x")
    options = silent.server.storage_options
    assert listed(url.removesuffix("1.jpg"), options) == [url]
    fs, path = filesystem(url, options)
    assert fs.ls(path.removesuffix("/1.jpg"), detail=False) == [path]
    assert silent.control.faults(["stall"]) > 0


def test_a_write_goes_on(gcs_server: GcsServer, silent: FlakyProxy[Any]) -> None:
    fs, path = filesystem(f"gs://{gcs_server.make_bucket()}/out/run.json", silent.server.storage_options)
    put_bytes(fs, path, b"[1]")
    assert read_json(fs, path) == [1]
    create_bytes(fs, f"{path}.lock", b"[2]")  # whether its own first try was the one that made it, it cannot know
    assert read_json(fs, f"{path}.lock") == [2]
    assert silent.control.faults(["stall"]) > 0


def test_a_limit_of_ones_own_holds(gcs_server: GcsServer, silent: FlakyProxy[Any]) -> None:
    silent.control.set_rules(Rule("stall", methods=WRITES))
    options = {**silent.server.storage_options, "requests_timeout": 0.5}
    fs, path = filesystem(f"gs://{gcs_server.make_bucket()}/out/run.json", options)
    with pytest.raises(OutputError, match=r"cannot write gs://.*/run\.json: FSTimeoutError"):
        put_bytes(fs, path, b"[1]")
    assert silent.control.faults() == 1

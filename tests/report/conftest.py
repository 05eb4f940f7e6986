"""One run that is explored, and a client of the server that shows it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from report.album import Album, full_run
from report.explore_client import Client, searcher_of, serving

from pipeline.report.explore_state import open_exploration
from pipeline.report.run import open_run


@pytest.fixture(scope="session")
def explored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Album, Path]:
    """150 rows, clusters and near-duplicates."""
    album = Album(tmp_path_factory.mktemp("explored"), count=150)
    return album, full_run(album)


@pytest.fixture(scope="module")
def client(explored: tuple[Album, Path]) -> Iterator[Client]:
    """Asks a server without a token, which can search and embed."""
    album, run = explored
    with serving(open_exploration(open_run(str(run), {}), searcher_of(album))) as server:
        yield Client(server)

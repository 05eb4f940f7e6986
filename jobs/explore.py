"""`explore`: a local page to look through a run and search it by picture."""

from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.options import Directory, Options, parse_options
from jobs.output import emit
from jobs.retrieve_screen import Features, feature_of
from schemas.errors import Interrupted

if TYPE_CHECKING:
    from pipeline.report.explore_state import Exploration, Floats, Ints, Searcher, TextSearcher
    from pipeline.report.run import RunDirectory
    from pipeline.retrieval.matrix import Matrix
    from pipeline.retrieval.store import FeatureStore


def explore(
    directory: Directory,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8765,
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback needs --token.")] = "127.0.0.1",
    token: Annotated[
        str | None, typer.Option(envvar="PATCHSTREAM_TOKEN", help="What a browser must know to be let in.")
    ] = None,
    features: Features = None,
    vocabulary: Annotated[
        str | None, typer.Option(help="For search by text: the vocabulary, if not beside the model.", metavar="FILE")
    ] = None,
    storage_options: Options = None,
) -> int:
    """Serve a local page: browse pictures, clusters and duplicates, search by picture or text. Ctrl-C ends it."""
    from pipeline.report.explore_server import ExploreServer, check_port, check_reach
    from pipeline.signals import stoppable

    # Before the vectors of a large run are read.
    check_reach(host, token)
    check_port(host, port)
    with stoppable() as stop:
        try:
            exploration = _open(directory, features, parse_options(storage_options), vocabulary)
        except KeyboardInterrupt:
            raise Interrupted("interrupted", stop.number) from None
        stop.at_once = False
        try:
            with ExploreServer(exploration, host, port, token) as server:
                emit(f"{server.url}{'?token=…' if token else ''}  (Ctrl-C ends it)")
                server.serve_until(lambda: bool(stop.number))
        finally:
            exploration.close()
    emit("ended", to_stderr=True)
    return 0


COMMANDS: dict[str, Callable[..., Any]] = {"explore": explore}


def _open(directory: str, feature: str | None, options: dict[str, Any], vocabulary: str | None = None) -> "Exploration":
    from pipeline.report.explore_state import open_exploration
    from pipeline.report.run import open_run

    run = open_run(directory, options)
    return open_exploration(run, _searcher(directory, run, feature, options, vocabulary))


def _searcher(
    directory: str, run: "RunDirectory", feature: str | None, options: dict[str, Any], vocabulary: str | None
) -> "Searcher | None":
    """Exact search over the features of the run; None where it holds no features and none were asked for."""
    if feature is None and not run.features():
        return None
    from pipeline.embedding import Embedder
    from pipeline.report.explore_state import Searcher
    from pipeline.retrieval.store import FeatureStore

    store = FeatureStore.open(directory, options)
    name = feature_of(store, feature)
    matrix = _read(store, name)

    def vector_of(row: int) -> "Floats | None":
        import numpy as np

        positions = matrix.positions_of(np.array([row]))
        if positions[0] < 0:
            raise LookupError(f"row {row} came after the vectors were read")
        return matrix.take(positions).reshape(-1) if matrix.directed[positions[0]] else None

    has_model = run.record.model.family != "null"
    embed = Embedder(run.record, name, storage_options=options).image if has_model else None
    return Searcher(name, vector_of, _nearest(matrix), embed, _texts(store, matrix, options, vocabulary))


def _read(store: "FeatureStore", name: str) -> "Matrix":
    emit(f"reading {name} of {len(store):,} rows", to_stderr=True)
    return store.load(name)


def _texts(
    store: "FeatureStore", matrix: "Matrix", options: dict[str, Any], vocabulary: str | None
) -> "TextSearcher | None":
    from pipeline.embedding import TEXT_FEATURE, Embedder, may_have_texts
    from pipeline.report.explore_state import TextSearcher

    if not may_have_texts(store.record) or TEXT_FEATURE not in store.features:
        return None
    embedder = Embedder(store.record, TEXT_FEATURE, vocabulary=vocabulary, storage_options=options)
    reading = Lock()
    known = [_nearest(matrix)] if matrix.name == TEXT_FEATURE else []

    def nearest() -> "Callable[[Floats, int], tuple[Ints, Floats]]":
        # Not before: this copies all vectors, and only the first search tells whether there is a text tower.
        with reading:
            if not known:
                known.append(_nearest(_read(_as_now(store), TEXT_FEATURE)))
            return known[0]

    return TextSearcher(
        TEXT_FEATURE,
        nearest,
        lambda vector, k: nearest()(vector, k),
        lambda text: embedder.texts([text]).reshape(-1),
    )


def _as_now(store: "FeatureStore") -> "FeatureStore":
    """`store`; where parts of it were compacted since, with those that hold its rows now."""
    from pipeline.retrieval.parts import parts_instead

    parts = parts_instead(store.fs, store.root, store.record, store.parts, store.schema)
    return store if parts is None else type(store)(store.fs, store.root, store.record, parts, store.schema)


def _nearest(matrix: "Matrix") -> "Callable[[Floats, int], tuple[Ints, Floats]]":
    from pipeline.retrieval.arrays import unit
    from pipeline.retrieval.nearest import top_k

    def nearest(vector: "Floats", k: int) -> "tuple[Ints, Floats]":
        scores, positions = top_k(matrix, unit(vector[None]), k)
        return matrix.rows[positions[0]], scores[0]

    return nearest

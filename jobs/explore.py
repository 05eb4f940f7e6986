"""`explore`: a local page to look through a run and search it by picture."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.options import Directory, Options, parse_options
from jobs.output import emit
from jobs.retrieve_embed import model_of
from jobs.retrieve_screen import Features, feature_of
from schemas.errors import ImageError, Interrupted

if TYPE_CHECKING:
    from pipeline.predictors.torch_predictor import TorchPredictor
    from pipeline.report.explore_state import Exploration, Floats, Ints, Searcher
    from pipeline.report.run import RunDirectory
    from schemas.run import RunRecord


def explore(
    directory: Directory,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8765,
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback needs --token.")] = "127.0.0.1",
    token: Annotated[
        str | None, typer.Option(envvar="PATCHSTREAM_TOKEN", help="What a browser must know to be let in.")
    ] = None,
    features: Features = None,
    storage_options: Options = None,
) -> int:
    """Serve a local page: browse pictures, clusters and duplicates, search by picture. Ctrl-C ends it."""
    from pipeline.report.explore_server import ExploreServer, check_reach
    from pipeline.signals import stoppable

    check_reach(host, token)  # before the vectors of a large run are read
    with stoppable() as stop:
        try:
            exploration = _open(directory, features, parse_options(storage_options))
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


def _open(directory: str, feature: str | None, options: dict[str, Any]) -> "Exploration":
    from pipeline.report.explore_state import open_exploration
    from pipeline.report.run import open_run

    run = open_run(directory, options)
    return open_exploration(run, _searcher(directory, run, feature, options))


def _searcher(directory: str, run: "RunDirectory", feature: str | None, options: dict[str, Any]) -> "Searcher | None":
    """Exact search over the features of the run; None where it holds no features and none were asked for."""
    if feature is None and not run.features():
        return None
    from pipeline.report.explore_state import Searcher
    from pipeline.retrieval.arrays import unit
    from pipeline.retrieval.nearest import top_k
    from pipeline.retrieval.store import FeatureStore

    store = FeatureStore.open(directory, options)
    name = feature_of(store, feature)
    emit(f"reading {name} of {len(store):,} rows", to_stderr=True)
    matrix = store.load(name)

    def vector_of(row: int) -> "Floats | None":
        import numpy as np

        positions = matrix.positions_of(np.array([row]))
        return matrix.take(positions).reshape(-1) if positions[0] >= 0 and matrix.directed[positions[0]] else None

    def nearest(vector: "Floats", k: int) -> "tuple[Ints, Floats]":
        scores, positions = top_k(matrix, unit(vector[None]), k)
        return matrix.rows[positions[0]], scores[0]

    return Searcher(name, vector_of, nearest, _embedder(run.record, name, options))


def _embedder(record: "RunRecord", feature: str, options: dict[str, Any]) -> "Callable[[bytes], Floats] | None":
    """Bytes of a picture to its vector, by the model and the preprocessing of the run; None where it had no model.

    The model is loaded when the first picture comes. The function raises CheckpointError if it is another one by
    now, ImageError for what is no picture.
    """
    if record.model.family == "null":
        return None
    predictors: list[TorchPredictor] = []

    def embed(data: bytes) -> "Floats":
        from pipeline.predictors.batches import pixels_of

        if not predictors:
            predictors.append(_predictor(record, feature, options))
        decoded = _decoded(data, record)
        pixels = pixels_of(decoded, *record.model.preprocessing.output_size)
        vector: Floats = predictors[0].predict(pixels).features[feature][0]
        return vector

    return embed


def _predictor(record: "RunRecord", feature: str, options: dict[str, Any]) -> "TorchPredictor":
    from pipeline.predictors.batches import Wanted
    from pipeline.predictors.torch_predictor import TorchPredictor

    info = model_of(record, None, options)
    wanted = Wanted(
        (feature,), (info.pooled_size if feature == "pooled" else info.hidden_size,), "float32", 0, (), False
    )
    return TorchPredictor(info, wanted, dtype=record.model.dtype, batch_size=1)


def _decoded(data: bytes, record: "RunRecord") -> Any:
    """A decoded table of one row; the picture goes through a file, as any other picture does."""
    import tempfile

    import pyarrow as pa

    from pipeline.images.stage import Reading, fetch_and_decode
    from schemas.tables import MANIFEST_FIELDS

    with tempfile.NamedTemporaryFile(prefix="patchstream-") as file:
        file.write(data)
        file.flush()
        row = {"row": 0, "uri": file.name, "size": len(data)}
        (decoded,) = fetch_and_decode(
            pa.Table.from_pylist([row], pa.schema(MANIFEST_FIELDS)),
            Reading(record.model.preprocessing, decode=record.spec.get("decode", "exact")),
            batch_rows=1,
        )
    failed = decoded.select(["stage", "error", "message"]).to_pylist()[0]
    if failed["error"]:
        raise ImageError(failed["stage"], failed["error"], failed["message"].replace(file.name, "the file"))
    return decoded

"""`search` and `index`: which pictures are like this one."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.options import AsJson, Directory, Options, options_given, parse_options
from jobs.output import emit, show_rows, with_options
from jobs.retrieve_screen import (
    LOCAL_RAY,
    Features,
    feature_of,
    opened,
    print_json,
    print_table,
    thumbnails,
    warn_left_out,
    write_page,
)
from schemas.errors import SpecError

if TYPE_CHECKING:
    from pipeline.embedding import Embedder
    from pipeline.retrieval.index import Index
    from pipeline.retrieval.search import Example, Hit
    from pipeline.retrieval.store import FeatureStore

_DEFAULT_K = 10

Name = Annotated[str, typer.Option(help="The name under DIR/index/.")]


def search(
    directory: Directory,
    image: Annotated[list[str] | None, typer.Option(help="A picture: file or URL.", metavar="FILE")] = None,
    row: Annotated[list[int] | None, typer.Option(help="A row of the run.", metavar="N")] = None,
    uri: Annotated[list[str] | None, typer.Option(help="The address of a row.", metavar="U")] = None,
    vector: Annotated[list[str] | None, typer.Option(help="A vector as .npy.", metavar="F.npy")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Words, for a model with a text tower.", metavar="T")] = None,
    minus: Annotated[
        list[str] | None,
        typer.Option(help="Less like this: row=N, uri=U, image=FILE, vector=F.npy or text=T.", metavar="KIND=VALUE"),
    ] = None,
    k: Annotated[int | None, typer.Option("-k", min=1, help="How many; 10 if not said.")] = None,
    features: Features = None,
    where: Annotated[
        str | None,
        typer.Option("--filter", help="SQL condition, such as \"labels[1].label like 'tench%'\".", metavar="SQL"),
    ] = None,
    index: Annotated[
        str | None, typer.Option(help="Search by this index: faster, approximate.", metavar="NAME")
    ] = None,
    centre: Annotated[bool, typer.Option("--centre", help="Take the mean away before comparing.")] = False,
    with_examples: Annotated[
        bool, typer.Option("--with-examples", help="Let rows given as examples be found.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Where the run's model is, if it has moved.")] = None,
    vocabulary: Annotated[
        str | None, typer.Option(help="For --text: the vocabulary, if not beside the model.", metavar="FILE")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda, for the exact search.")] = "cpu",
    html: Annotated[str | None, typer.Option(help="Write a page with thumbnails.", metavar="F")] = None,
    storage_options: Options = None,
    as_json: AsJson = False,
) -> int:
    """Find the pictures most like some examples, exactly or by an index."""
    from pipeline.embedding import TEXT_FEATURE, Embedder, check_texts
    from pipeline.retrieval.nearest import check_device
    from pipeline.retrieval.search import check_exact, check_examples

    check_device(device)
    check_exact(where, index)
    examples = [*_examples(image, row, uri, vector, text), *(_minus(value) for value in minus or ())]
    texts = [example.value for example in examples if example.kind == "text"]
    with opened(directory, storage_options) as store:
        if texts:
            features = features or TEXT_FEATURE
            check_texts(store.record, features, texts)
        feature = feature_of(store, features)
        check_examples(store, feature, examples)
        if k is not None and k > len(store):
            raise SpecError(f"-k {k}: {len(store)} rows are there; ask for between 1 and that")
        if where is not None:
            store.check_filter(where)
        built = None if index is None else _load_index(store, index, feature, centre)
        warn_left_out(store, feature)
        place = parse_options(storage_options)
        embed = Embedder(store.record, feature, model=model, vocabulary=vocabulary, storage_options=place)
        options = {"where": where, "keep_examples": with_examples, "device": device}
        hits = _find(store, examples, embed, feature, k, built, centre, options)
    if as_json:
        print_json(hits)
    else:
        print_table(["row", "score", "uri"], [[hit["row"], round(hit["score"], 4), hit["uri"]] for hit in hits])
    if html:  # last, so that a page that cannot be written takes no answer with it
        _write_strip(html, directory, storage_options, hits)
    return 0


def _load_index(store: "FeatureStore", name: str, feature: str, centre: bool) -> "Index":
    """The index NAME. Raises SpecError where it holds other vectors than a search by `feature` compares.

    What can be told without the vectors of the run is told before they are read.
    """
    from pipeline.retrieval.index import load, refuse_stale

    built = load(store, name)
    if not built.record.normalise:
        raise SpecError(
            f"--index {name} was built with --no-normalise, and a search goes by cosine; build one without it"
        )
    if built.record.feature != feature or centre:
        raise SpecError(
            f"--index {name} holds `{built.record.feature}`, centred: {built.record.mean is not None}; leave out "
            "--centre, and give --features as it was built"
        )
    if built.record.rows != int(store.load(feature).usable.sum()):
        refuse_stale(name, "rows that it holds were replaced since")
    return built


def _find(
    store: "FeatureStore",
    examples: "list[Example]",
    embed: "Embedder",
    feature: str,
    k: int | None,
    built: "Index | None",
    centre: bool,
    options: dict[str, Any],
) -> "list[Hit]":
    from pipeline.retrieval import index as indexes
    from pipeline.retrieval.search import build_query
    from pipeline.retrieval.search import search as find

    matrix = store.load(feature)
    wanted = min(_DEFAULT_K, int(matrix.usable.sum())) if k is None else k
    if built is None:
        prepare = store.preparation(feature, centre=centre)
        query = build_query(store, feature, examples, embed.images, prepare, embed.texts)
        return find(store, query, wanted, feature=feature, prepare=prepare, **options)
    query = build_query(store, feature, examples, embed.images, built.prepare, embed.texts)
    hits = find(
        store,
        query,
        wanted,
        feature=feature,
        finder=lambda queries, most: indexes.find(built, matrix, queries, most),
        **options,
    )
    if len(hits) < wanted:
        emit(
            f"warning: the index looks through a part of the rows and found {len(hits):,} of {wanted:,}; leave out "
            "--index for an exact search",
            to_stderr=True,
        )
    return hits


def _examples(
    image: list[str] | None,
    row: list[int] | None,
    uri: list[str] | None,
    vector: list[str] | None,
    text: list[str] | None,
) -> "list[Example]":
    from pipeline.retrieval.search import Example

    return [
        *(Example("image", value) for value in image or ()),
        *(Example("row", str(value)) for value in row or ()),
        *(Example("uri", value) for value in uri or ()),
        *(Example("vector", value) for value in vector or ()),
        *(Example("text", value) for value in text or ()),
    ]


def _minus(text: str) -> "Example":
    """`row=5`, or a bare value whose kind is plain: a number, a .npy file, a file that is there, an address."""
    from pipeline.retrieval.search import Example

    kind, equals, value = text.partition("=")
    match kind if equals else "":
        case "image" | "row" | "uri" | "vector" | "text" as known:
            return Example(known, value, minus=True)
    if text.lstrip("-").isdecimal():
        return Example("row", text, minus=True)
    if text.endswith(".npy"):
        return Example("vector", text, minus=True)
    return Example("image" if Path(text).is_file() else "uri", text, minus=True)


def _write_strip(path: str, directory: str, storage_options: str | None, hits: "list[Hit]") -> None:
    from pipeline.retrieval.page import Picture, pictures_page

    pictures = [Picture(hit["row"], [f"{hit['score']:.3f}", f"row {hit['row']}", hit["uri"]]) for hit in hits]
    shown = thumbnails(directory, storage_options, [hit["row"] for hit in hits])
    page = pictures_page("Search results", [(f"The {len(hits)} nearest", pictures)], shown)
    write_page(path, page, storage_options)


_BUILT_WITH = ("kind", "features", "centre", "normalise", "ray")


def index(
    context: typer.Context,
    directory: Directory,
    kind: Annotated[str | None, typer.Option(help="flat, ivf-flat, ivf-pq or hnsw; by size if not said.")] = None,
    name: Name = "main",
    features: Features = None,
    centre: Annotated[bool, typer.Option("--centre", help="Take the mean away first.")] = False,
    normalise: Annotated[bool, typer.Option(help="Scale vectors to length 1, so that scores are cosines.")] = True,
    update: Annotated[bool, typer.Option("--update", help="Bring the index up to date with the parts.")] = False,
    evaluate: Annotated[
        bool,
        typer.Option("--evaluate", help="Print recall@10 and the time for a query; builds only if there is no index."),
    ] = False,
    ray: Annotated[str | None, typer.Option(help="Build over parts on Ray: an address, or `local`.")] = None,
    storage_options: Options = None,
    as_json: AsJson = False,
) -> int:
    """Build a faiss index for `search --index`, bring it up to date, or measure it."""
    from pipeline.retrieval import index as indexes
    from pipeline.retrieval.index_kinds import check_kind
    from pipeline.retrieval.output import check_name
    from pipeline.retrieval.recall import evaluate as measure
    from pipeline.retrieval.recall import tune

    check_name(name)
    if update and (others := options_given(context, *_BUILT_WITH)):
        raise SpecError(f"--update keeps an index as it was built; leave out {others}, or build it anew")
    checked = check_kind(kind) if kind else None
    if ray is not None:
        from pipeline.retrieval.ray_index import check_in_pieces

        check_in_pieces(checked)
    summary: dict[str, Any] = {"name": name}
    with opened(directory, storage_options) as store:
        asked_only = evaluate and not update and kind is None and indexes.exists(store, name)
        if asked_only:
            if others := options_given(context, *_BUILT_WITH):
                raise SpecError(
                    f"--evaluate measures the index `{name}` as it was built; leave out {others}, or add --kind to "
                    "build it anew"
                )
            built = indexes.load(store, name)
        elif update:
            built, summary["added"] = indexes.update(store, name)
            built = tune(built, store.load(built.record.feature))
            indexes.save(store, built, name)
        else:
            feature = feature_of(store, features)
            warn_left_out(store, feature)
            built = _build(store, ray, feature=feature, kind=checked, normalise=normalise, centre=centre)
            built = tune(built, store.load(feature))
            indexes.save(store, built, name)
        record = built.record
        summary |= record.model_dump(mode="json", include={"kind", "feature", "rows", "left_out", "lists", "search"})
        summary["recall_at_10"] = record.recall_at_10
        if evaluate:
            summary |= measure(built, store.load(record.feature))
    if as_json:
        print_json(summary)
    else:
        shown = {key.replace("_", " "): value for key, value in summary.items() if value not in (None, {})}
        show_rows([(key, f"{value:,.4g}" if isinstance(value, float) else str(value)) for key, value in shown.items()])
        if record.normalise:  # else it is for programs: a search goes by cosine
            command = f"patchstream search {shlex.quote(directory)} --index {name} …"
            emit(with_options(command, parse_options(storage_options)))
    return 0


def _build(store: Any, ray: str | None, **options: Any) -> Any:
    if ray is None:
        from pipeline.retrieval.index import build

        return build(store, **options)
    from cluster.session import ray_session
    from pipeline.retrieval.ray_index import build_on_ray

    with ray_session(None if ray in LOCAL_RAY else ray):
        return build_on_ray(store, **options)


COMMANDS: dict[str, Callable[..., Any]] = {"search": search, "index": index}

"""Build an index over parts on a Ray cluster: trained here, filled part by part there, merged here.

What Ray spares this machine is the filling. It still needs the matrix, to train and to measure recall, as every
search by the index does.
"""

import faiss
import numpy as np

from pipeline.retrieval.index import Index, Kind, check_kind, describe, kind_for, new_index, train
from pipeline.retrieval.parts import Part
from pipeline.retrieval.ray_parts import PartReader, over_parts
from pipeline.retrieval.store import FeatureStore
from schemas.errors import OutputError, SpecError


def check_in_pieces(kind: str | None) -> None:
    """Raise SpecError for a kind of index that cannot be put together from those of the parts."""
    if kind == "hnsw":
        raise SpecError("--kind hnsw cannot be built over parts; leave out --ray, or choose another kind")


def build_on_ray(
    store: FeatureStore, *, feature: str, kind: Kind | None, normalise: bool = True, centre: bool = False
) -> Index:
    """What `index.build` builds. Ray has to be connected.

    Raises SpecError for `hnsw`, whose graph cannot be put together from pieces.
    """
    check_in_pieces(kind)
    matrix = store.load(feature)
    rows = int(matrix.usable.sum())
    if rows == 0:
        raise OutputError(f"`{feature}` has no usable vector: all {len(matrix)} are zero or not finite")
    chosen = check_kind(kind) if kind else kind_for(rows, matrix.dim)
    prepare = store.preparation(feature, normalise=normalise, centre=centre)
    index, lists = new_index(chosen, matrix.dim, rows)
    store.progress("training", 0, 1)
    train(index, matrix, prepare, lists)
    reader = PartReader(store.fs, feature, matrix.dim, prepare, store.replaced)
    empty = faiss.serialize_index(index)
    for number, (_, filled) in enumerate(over_parts(_fill, store.parts, reader, empty)):
        index.merge_from(faiss.deserialize_index(filled), 0)
        store.progress("indexing", number + 1, len(store.parts))
    return Index(index, describe(store, matrix, chosen, prepare, lists))


def _fill(part: Part, reader: PartReader, empty: np.ndarray) -> np.ndarray:
    """The index with the vectors of one part, serialised."""
    index = faiss.deserialize_index(empty)
    for rows, vectors in reader.batches(part):
        if len(rows):
            index.add_with_ids(vectors, rows)
    return np.asarray(faiss.serialize_index(index))

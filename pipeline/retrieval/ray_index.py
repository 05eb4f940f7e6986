"""Build an index over parts on a Ray cluster: trained here, filled part by part there, merged here.

What Ray spares this machine is the filling. It still needs the matrix, to train and to measure recall, as every
search by the index does.
"""

import faiss
import numpy as np

from pipeline.retrieval.index import Index, trained
from pipeline.retrieval.index_kinds import Kind
from pipeline.retrieval.parts import Part
from pipeline.retrieval.ray_parts import PartReader, over_parts
from pipeline.retrieval.store import FeatureStore
from schemas.errors import SpecError


def check_in_pieces(kind: str | None) -> None:
    """Raise SpecError for a kind of index that cannot be put together from those of the parts."""
    if kind == "hnsw":
        raise SpecError("--kind hnsw cannot be built over parts; leave out --ray, or choose another kind")


def build_on_ray(
    store: FeatureStore, *, feature: str, kind: Kind | None, normalise: bool = True, centre: bool = False
) -> Index:
    """What `index.build` builds. Ray has to be connected.

    Raises as `index.build`, SpecError also for `hnsw`, whose graph cannot be put together from pieces.
    """
    check_in_pieces(kind)
    index, matrix = trained(store, feature, kind, normalise, centre)
    reader = PartReader(store.fs, feature, matrix.dim, index.prepare, store.replaced)
    empty = faiss.serialize_index(index.faiss)
    for number, (_, filled) in enumerate(over_parts(_fill, store.parts, reader, empty)):
        index.faiss.merge_from(faiss.deserialize_index(filled), 0)
        store.progress("indexing", number + 1, len(store.parts))
    return index


def _fill(part: Part, reader: PartReader, empty: np.ndarray) -> np.ndarray:
    """The index with the vectors of one part, serialised."""
    index = faiss.deserialize_index(empty)
    for rows, vectors in reader.batches(part):
        if len(rows):
            index.add_with_ids(vectors, rows)
    return np.asarray(faiss.serialize_index(index))

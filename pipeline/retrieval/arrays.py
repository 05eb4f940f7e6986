"""Array types, and the two options that change a vector before it is compared: centring and L2-normalisation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

# Told what is being done, how much of it is done and how much there is: `("reading cls", 4096, 1000000)`.
Progress = Callable[[str, int, int], None]


def no_progress(what: str, done: int, total: int) -> None:
    """The default listener."""


@dataclass(frozen=True)
class Preparation:
    """What is done to vectors before they are compared: the mean taken away, then scaled to unit length.

    Inner products of prepared vectors are cosines when `normalise` is set. `mean` is of shape (D,) or None.
    """

    normalise: bool = True
    mean: Floats | None = None

    def apply(self, vectors: Floats) -> Floats:
        """A prepared float32 copy of `vectors` (n, D). A vector without direction becomes zeros."""
        prepared = vectors - self.mean if self.mean is not None else vectors
        if not self.normalise:
            return np.array(prepared, np.float32) if prepared is vectors else prepared
        return unit(prepared)


def lengths(vectors: NDArray[Any]) -> Floats:
    """Euclidean length of each row of (n, D); inf where it overflows float32, NaN where the vector holds NaN."""
    wide = vectors.astype(np.float32, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        norms: Floats = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    return norms


def directed(norms: Floats) -> Mask:
    """(n,) whether a vector of this length has a direction: false for zeros, NaN and infinities."""
    mask: Mask = np.isfinite(norms) & (norms > 0)
    return mask


def unit(vectors: Floats) -> Floats:
    """(n, D) scaled to length 1 each; a zero vector stays zero."""
    norms = lengths(vectors)
    scaled: Floats = vectors / np.where(norms > 0, norms, 1.0).astype(np.float32)[:, None]
    return scaled

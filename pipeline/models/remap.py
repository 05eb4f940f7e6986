"""Translating a checkpoint's tensors into our names, and saying exactly what does not fit."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from pipeline.models.architecture import Architecture, Shape, tensor_shapes
from pipeline.models.formats.format import Shapes, Spelling
from schemas.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

LISTED = 12


class Piece(NamedTuple):
    """A tensor of the checkpoint (None: zeros) that makes up one of ours or a part of its first axis."""

    name: str | None
    shape: Shape


Plan = Mapping[str, tuple[Piece, ...]]


def plan(a: Architecture, spelling: Spelling) -> Plan:
    """Our name → the pieces it is put together from, in order along the first axis."""
    return plan_shapes(tensor_shapes(a), spelling, keyless=a.qkv_bias == "query_value")


def plan_shapes(shapes: Shapes, spelling: Spelling, *, keyless: bool = False) -> Plan:
    """The same for the tensors of `shapes`, in our names. `keyless`: queries and values have biases, keys zeros."""
    return {name: _pieces(spelling, name, shape, keyless) for name, shape in shapes.items()}


def _pieces(spelling: Spelling, name: str, shape: Shape, keyless: bool) -> tuple[Piece, ...]:
    block = re.match(r"blocks\.(\d+)\.", name)
    template = f"blocks.{{i}}.{name[block.end() :]}" if block else name
    module, _, parameter = template.rpartition(".")
    theirs = spelling.get(template)
    if theirs is None:
        theirs = _with_suffix(spelling[module], parameter)
    names = (theirs,) if isinstance(theirs, str) else theirs
    if keyless and template == "blocks.{i}.qkv.bias" and len(names) == 3:
        names = (names[0], None, names[2])
    index = block[1] if block else ""
    parts = _part_rows(shape[0], len(names), fused=".qkv." in name)
    return tuple(
        Piece(each and each.replace("{i}", index), (rows, *shape[1:])) for each, rows in zip(names, parts, strict=True)
    )


def _part_rows(rows: int, count: int, *, fused: bool) -> list[int]:
    """Rows of each of `count` parts: equal, but (q, kv) where fused queries, keys and values come as two."""
    if fused and count == 2:
        return [rows // 3, rows - rows // 3]
    return [rows // count] * count


def _with_suffix(theirs: str | tuple[str | None, ...], parameter: str) -> str | tuple[str | None, ...]:
    if isinstance(theirs, str):
        return f"{theirs}.{parameter}"
    return tuple(each and f"{each}.{parameter}" for each in theirs)


def check(wanted: Plan, found: Shapes, ignored: tuple[str, ...], assumed: str) -> None:
    """Raise CheckpointError listing tensors that are missing, unexpected or of another shape than `assumed` implies."""
    expected = {piece.name: piece.shape for pieces in wanted.values() for piece in pieces if piece.name is not None}
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in found]
    pattern = re.compile("|".join(ignored)) if ignored else None
    surplus = [
        f"{name} {list(shape)}"
        for name, shape in found.items()
        if name not in expected and not (pattern and pattern.fullmatch(name))
    ]
    other = [
        f"{name}: {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and _plain(found[name]) != _plain(shape)
    ]
    problems = [("missing", missing), ("unexpected", surplus), ("of another shape", other)]
    if missing or surplus or other:
        lines = [f"  {len(names)} {what}: {_some(names)}" for what, names in problems if names]
        raise CheckpointError("\n".join([f"{assumed}, but its tensors do not fit:", *lines]))


def require_depth(depth: int, found: Shapes, where: str) -> None:
    """Raise CheckpointError for more blocks than there are tensors, before each tensor of each block is listed."""
    if depth > len(found):
        raise CheckpointError(
            f"{where}: {depth} blocks, but {len(found)} tensors, and a block has several; correct num_hidden_layers in "
            "config.json, or fetch config and weights again"
        )


def _plain(shape: Shape) -> Shape:
    """`shape` without leading axes of length 1, by which libraries differ: a CLS token is (D,) or (1, 1, D)."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _some(names: list[str]) -> str:
    more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def remap(tensors: Mapping[str, "Tensor"], wanted: Plan) -> dict[str, "Tensor"]:
    """State dict in the checkpoint's names → the same in ours."""
    import torch

    def put_together(pieces: tuple[Piece, ...]) -> "Tensor":
        if len(pieces) == 1 and pieces[0].name is not None:
            return tensors[pieces[0].name].reshape(pieces[0].shape)
        dtype = next(tensors[piece.name].dtype for piece in pieces if piece.name is not None)
        parts = [torch.zeros(p.shape, dtype=dtype) if p.name is None else tensors[p.name] for p in pieces]
        return torch.cat(parts)

    return {name: put_together(pieces) for name, pieces in wanted.items()}

"""What is wrong with a spec, in words that may be printed: the value at fault is told, a credential never."""

import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel

from schemas.redaction import redact

Model = type[BaseModel]
_KIND = re.compile(r"-int$|\[.*\]$")


def explain(item: Any, spec: Model) -> str:
    """One of the errors of a pydantic ValidationError over `spec`: the key, the rule it broke, the value."""
    location = [str(part) for part in item["loc"]]
    # Of a value that may be of several kinds, pydantic names the kind that it tried.
    name = ".".join(part for part in location if location[0] == "storage_options" or not _KIND.search(part))
    if item["type"] == "extra_forbidden":
        return f"unknown key `{name}` in the spec; {_hint(location, spec)}"
    rule = redact(item["msg"].removeprefix("Value error, "))
    if item["type"] == "model_type":
        rule = f"expected a table with some of the keys {', '.join(sorted(_model_at(location, spec).model_fields))}"
    elif item["type"] == "tuple_type":
        rule = "expected a list"
    return f"{name or 'spec'}: {rule}{_given(item)}"


def _given(item: Any) -> str:
    """The value at fault, in words. Only one that is no container and stands where no secret does: the input of a rule
    about several keys is all of them, credentials included."""
    value, location = item["input"], item["loc"]
    secret = location[:1] == ("storage_options",) or location == ("triton",) or location[:2] == ("triton", "headers")
    if secret or not location or item["type"] == "missing" or not isinstance(value, str | int | float | None):
        return ""
    return f" (given: {redact(value) if isinstance(value, str) else value!r:.120})"


def _hint(location: Sequence[str], spec: Model) -> str:
    """The known key that is nearest, also one a level down, which as an option stands beside the others."""
    model = _model_at(location[:-1], spec)
    keys = {name: name for name in sorted(model.model_fields)}
    below: dict[str, str] = {}
    for name in keys:
        for part in _models_in(model.model_fields[name].annotation):
            below |= {inner: f"{name}.{inner}" for inner in part.model_fields}
            below |= {f"{name}_{inner}": f"{name}.{inner}" for inner in part.model_fields}
    near = difflib.get_close_matches(location[-1], below | keys, n=1, cutoff=0.5)
    return f"did you mean `{(below | keys)[near[0]]}`?" if near else f"known keys: {', '.join(keys)}"


def _model_at(location: Sequence[str], spec: Model) -> Model:
    model = spec
    for part in location:
        model = next(iter(_models_in(model.model_fields[part].annotation)))
    return model


def _models_in(annotation: Any) -> list[Model]:
    """Of `TritonSpec | None`, TritonSpec; of what is no table, nothing."""
    kinds = (annotation, *get_args(annotation))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]

"""Options that several commands take: their types, and what is made of their values."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from schemas.errors import SpecError

Directory = Annotated[str, typer.Argument(help="The --out of a run.", metavar="DIR")]
Options = Annotated[str | None, typer.Option("--storage-options", help="JSON for fsspec.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show tracebacks and Ray's own output.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Force = Annotated[bool, typer.Option("--force", help="Take a run that another machine began for dead, and end it.")]
AsForEmbed = Annotated[str | None, typer.Option(help="As for embed.")]
FinalNorm = Annotated[bool, typer.Option("--beit-final-norm", help="BEiT pt22k: apply its trained final norm.")]
SeveralAsForEmbed = Annotated[list[str] | None, typer.Option(help="As for embed.")]

# Options that say which images, and how the model sees them, which commands that try a sample of a job take as well.
SAMPLED = ("image_size", "revision", "include", "exclude", "uri_column", "image_column")
_FETCH_KEYS = {"timeout_s": "timeout", "max_bytes": "max_bytes", "max_pixels": "max_pixels"}
_TRITON_KEYS = {"url": "triton_url", "model_name": "triton_model"}


def parse_options(text: str | None) -> dict[str, Any]:
    """`--storage-options` as a dict."""
    return json_object(text) if text else {}


def json_object(text: str) -> dict[str, Any]:
    """The value of `--storage-options`. Raises SpecError, without a word of the text, where it is no JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        # Neither the text nor the parser's excerpt of it is shown: it may hold a key.
        raise SpecError(f"--storage-options is not JSON (position {error.pos}: {error.msg})") from None
    if not isinstance(value, dict):
        raise SpecError('--storage-options must be a JSON object such as {"anon": true}')
    return value


def batch_size_of(text: str) -> int | str:
    """The value of `--batch-size`; what is no number stays, for the spec to refuse or to be `auto`."""
    return int(text) if text.isdecimal() else text


def options_given(context: typer.Context, *names: str) -> str:
    """Those of the options `names` that stand on the command line, as they are typed; empty if none does."""
    found = []
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in names and source is not None and source.name != "DEFAULT":
            switched_off = context.params[option.name] is False and option.secondary_opts
            found.append((option.secondary_opts if switched_off else option.opts)[0])
    return ", ".join(found)


def sampled_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of SAMPLED that were given."""
    return {name: given[name] for name in SAMPLED if given[name]}


def nested_values(given: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options that stand one level down in the spec, over those that `base` already has there."""
    from schemas.values import ActorRange, Shard

    base = base or {}
    values: dict[str, Any] = {}
    if given.get("actors") is not None:
        values["actors"] = ActorRange.parse(given["actors"]).model_dump()
    if given.get("shard") is not None:
        values["shard"] = Shard.parse(given["shard"]).model_dump()
    if given.get("storage_options") is not None:
        values["storage_options"] = json_object(given["storage_options"])
    fetch = {key: given.get(option) for key, option in _FETCH_KEYS.items() if given.get(option) is not None}
    if fetch:
        values["fetch"] = _over(base.get("fetch"), fetch)
    triton = {key: given.get(option) for key, option in _TRITON_KEYS.items() if given.get(option) is not None}
    if given.get("triton_header"):
        triton["headers"] = dict(_header(text) for text in given["triton_header"])
    if triton:
        values["triton"] = _over(base.get("triton"), triton)
    return values


def _over(table: Any, options: dict[str, Any]) -> Any:
    """`options` over a table of the config file; what is no table stays, for the spec to refuse."""
    return table if table is not None and not isinstance(table, Mapping) else {**(table or {}), **options}


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon:
        raise SpecError("--triton-header must look like NAME: VALUE")
    return name.strip().lower(), value.strip()

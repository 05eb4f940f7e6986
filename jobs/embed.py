"""`embed` and `classify`: the main job from the command line."""

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from jobs.options import Revision, Verbose, batch_size_of, nested_values, parse_options
from schemas.errors import SpecError

_SOURCE_HELP = (
    "Files, folders, globs or prefixes on local disk, s3://, gs://, http(s):// or any fsspec scheme; CSV, JSONL or "
    "Parquet tables with a `uri` column; Parquet tables with image bytes; WebDataset .tar shards."
)

# Options whose value goes into the spec under the same name.
_SPEC_KEYS = (
    "model", "out", "revision", "features", "labels", "label_file", "feature_dtype", "dtype", "decode", "image_size",
    "beit_final_norm", "limit", "uri_column", "image_column", "backend", "vocabulary", "head", "gpus_per_actor",
    "max_failure_rate", "update",
)  # fmt: skip


def job(
    context: typer.Context,
    source: Annotated[list[str] | None, typer.Argument(help=_SOURCE_HELP)] = None,
    model: Annotated[str | None, typer.Option(help="A folder, an object-store prefix or a hub name.")] = None,
    out: Annotated[str | None, typer.Option(help="Where the dataset goes: a folder or an object-store prefix.")] = None,
    features: Annotated[
        str | None, typer.Option(help="Which features to write: any of cls, pooled, patches, visual_tokens; or none.")
    ] = None,
    labels: Annotated[
        int | None,
        typer.Option("--labels", "--top-k", help="How many labels an image, best first (embed: 0, classify: 5)."),
    ] = None,
    label_file: Annotated[
        str | None, typer.Option(help="Names of the classes in the model's order: one a line, or JSON id2label.")
    ] = None,
    feature_dtype: Annotated[str | None, typer.Option(help="float32 or float16 in the output.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16, float16 (GPU), int8 (CPU) or float8 (GPU).")
    ] = None,
    batch_size: Annotated[str | None, typer.Option(help="Images in a batch, or auto.")] = None,
    image_size: Annotated[
        str | None, typer.Option(help="Run the model at another resolution: pixels, or HEIGHTxWIDTH.")
    ] = None,
    revision: Revision = None,
    beit_final_norm: Annotated[
        bool | None, typer.Option("--beit-final-norm", help="BEiT pt22k: apply its trained final norm.")
    ] = None,
    zero_shot: Annotated[
        str | None,
        typer.Option(help="Labels in your own words, one a line, for CLIP, SigLIP and LiT.", metavar="FILE"),
    ] = None,
    templates: Annotated[
        str | None,
        typer.Option(help="Sentences with {} for the label, one a line (default: a photo of a {}.).", metavar="FILE"),
    ] = None,
    vocabulary: Annotated[
        str | None, typer.Option(help="The text tower's vocabulary, if not beside the model.", metavar="FILE")
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="A classifier of your own: DIR/probes/NAME, as `probe` left it.")
    ] = None,
    decode: Annotated[
        str | None, typer.Option(help="exact (as the reference processor, bit for bit) or fast (scaled JPEG decoding).")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N images.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Only addresses that match this glob (repeatable).")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="No addresses that match this glob (repeatable).")] = None,
    uri_column: Annotated[str | None, typer.Option(help="Column of a table that holds the addresses.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of a Parquet table that holds image bytes.")] = None,
    storage_options: Annotated[
        str | None, typer.Option(help='JSON for fsspec, flat or by scheme: {"s3": {"anon": true}}.')
    ] = None,
    backend: Annotated[str | None, typer.Option(help="torch, triton, or null (measures all but the model).")] = None,
    triton_url: Annotated[str | None, typer.Option(help="grpc://host:8001 or grpcs://host:8001.")] = None,
    triton_model: Annotated[str | None, typer.Option(help="Name of the model on the server.")] = None,
    triton_header: Annotated[list[str] | None, typer.Option(help="NAME: VALUE sent with each request.")] = None,
    actors: Annotated[str | None, typer.Option(help="Model replicas: N or MIN:MAX.")] = None,
    gpus_per_actor: Annotated[
        float | None, typer.Option(help="1, or a fraction: several replicas share a GPU. 0, the default: CPUs.")
    ] = None,
    shard: Annotated[str | None, typer.Option(help="I/N: only the I-th of N equal parts of the manifest.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to use (default: RAY_ADDRESS, else local).")] = None,
    cluster_wait: Annotated[
        float, typer.Option(help="Seconds to wait for machines that the cluster's autoscaler has yet to bring.")
    ] = 0.0,
    timeout: Annotated[float | None, typer.Option(help="Seconds for fetching one image, all tries together.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Files above this become failures.")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Pictures above this become failures.")] = None,
    max_failure_rate: Annotated[
        float | None,
        typer.Option(help="Exit with code 3 if a larger share of the images fails (default 1: if all do)."),
    ] = None,
    update: Annotated[
        bool | None, typer.Option("--update", help="List the sources again; process what is new or changed.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="TOML file with the same keys; options win over it.")] = None,
    report: Annotated[bool, typer.Option(help="Write report.html at the end.")] = True,
    attention_maps: Annotated[
        str | None, typer.Option(help="Afterwards, write attention rollout of some images to this folder, with a page.")
    ] = None,
    attention_images: Annotated[int, typer.Option(min=1, help="Of how many images at most.")] = 16,
    json_output: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    verbose: Verbose = False,
) -> int:
    given = dict(context.params)
    values = _values(given, context.info_name or "embed")
    from jobs.run import run_job

    attention = (attention_maps, attention_images) if attention_maps else None
    return run_job(
        values,
        address=address,
        report=report,
        json_output=json_output,
        verbose=verbose,
        attention=attention,
        wait_s=cluster_wait,
    )


def _values(given: dict[str, Any], task: str) -> dict[str, Any]:
    """Keys and values of the spec: the config file's, overlaid with the options that were given."""
    from schemas.spec import JobSpec

    values = _config(given["config"], given["storage_options"]) if given["config"] else {}
    values.setdefault("task", task)
    values |= {key: given[key] for key in _SPEC_KEYS if given[key] is not None}
    for key, option in (("sources", "source"), ("include", "include"), ("exclude", "exclude")):
        value = given[option] or values.get(key)
        if value:
            values[key] = [value] if isinstance(value, str) else value
    if given["batch_size"] is not None:
        values["batch_size"] = batch_size_of(given["batch_size"])
    values |= nested_values(given, values)
    storage_options = values.get("storage_options") or {}
    if not isinstance(storage_options, Mapping):
        raise SpecError("storage_options: expected a table, such as [storage_options.s3] with the keys below it")
    for name, option in (("zero_shot", "--zero-shot"), ("templates", "--templates")):
        lines = values.get(name) if given[name] is None else given[name]
        if isinstance(lines, str):
            values[name] = read_lines(lines, option, storage_options)
    missing = [name for name in ("sources", "model", "out") if not values.get(name)]
    # Where the file has a key that there is not, that is most likely the missing one: the spec tells of it.
    mistyped = set(values) - set(JobSpec.model_fields)
    if missing and not mistyped and not (missing == ["model"] and values.get("backend") == "null"):
        shown = {"sources": "SOURCE", "model": "--model", "out": "--out"}
        raise SpecError(
            f"{' and '.join(shown[name] for name in missing)} not given; "
            f"usage: patchstream {task} SOURCE... --model MODEL --out DIR"
        )
    values.setdefault("model", "null")
    return values


def _config(path: str, storage_options: str | None) -> dict[str, Any]:
    """Values of the config file, local or on an object store. Raises SpecError naming it."""
    from pipeline.small_files import Unreadable, read_small
    from pipeline.storage import redact
    from schemas.spec import parse_config

    try:
        data = read_small(path, parse_options(storage_options))
    except Unreadable as error:
        advice = "; give a TOML file"
        if "://" in path:
            advice = (
                ". The store's options and credentials are those of the environment and of --storage-options, not of "
                "the file"
            )
        raise SpecError(f"--config {redact(path)}: cannot be read ({error}){advice}") from None
    return parse_config(data, redact(path))


def read_lines(path: str, option: str, storage_options: Mapping[str, Any]) -> list[str]:
    """The lines of a text file, local or on an object store, without empty ones. Raises SpecError naming `option`."""
    from pipeline.small_files import Unreadable, read_small
    from pipeline.storage import redact

    try:
        text = read_small(path, storage_options).decode("utf-8-sig")
    except (Unreadable, UnicodeDecodeError) as error:
        raise SpecError(f"{option} {redact(path)}: cannot be read as text in UTF-8 ({error})") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _command(summary: str) -> Callable[..., int]:
    """The same options under another name; `job` tells by the name what is asked."""

    @functools.wraps(job)
    def command(*args: Any, **kwargs: Any) -> int:
        return job(*args, **kwargs)

    command.__doc__ = summary
    return command


COMMANDS = {
    "embed": _command("Write CLS and pooled features of every image to Parquet (and labels, with --labels K)."),
    "classify": _command("Write the best labels of every image to Parquet, with its features unless --features none."),
}

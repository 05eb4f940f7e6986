"""What a run is asked to do: `JobSpec`, strict, and the same from a TOML file.

A key that does not exist is an error that names the nearest one that does.
"""

import tomllib
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from schemas.errors import SpecError
from schemas.explain import explain
from schemas.values import WHOLE, ActorRange, ImageSize, Shard, Strict

FeatureName = Literal["cls", "pooled", "patches", "visual_tokens"]
DTypeName = Literal["auto", "float32", "bfloat16", "float16", "int8", "float8"]
FEATURE_NAMES: tuple[FeatureName, ...] = ("cls", "pooled", "patches", "visual_tokens")
# One vector for each image: what can be searched, clustered and probed.
VECTOR_NAMES: tuple[FeatureName, ...] = ("cls", "pooled")

MIB = 1024 * 1024


class FetchSpec(Strict):
    """How images are read. None of this changes the result, only how hard it is tried for."""

    concurrency: int = Field(default=16, ge=1, description="reads in flight for each decoding task")
    attempts: int = Field(default=4, ge=1, description="tries for throttling, resets and time-outs")
    timeout_s: float = Field(default=60.0, gt=0, description="for one image, all tries together")
    max_bytes: int = Field(default=256 * MIB, ge=1, description="a larger file becomes a failure row")
    max_pixels: int = Field(default=100_000_000, ge=1, description="a larger picture becomes a failure row")


class SinkSpec(Strict):
    """When parts are committed and how large compaction makes them."""

    commit_s: float = Field(default=30.0, gt=0, le=60.0, description="a part is committed at least this often")
    part_bytes: int = Field(default=64 * MIB, ge=1, description="a part is committed at this size")
    compact_bytes: int = Field(default=256 * MIB, ge=1, description="size that compaction aims at")


class TritonSpec(Strict):
    """Where a Triton server is and how to talk to it. Headers may carry a token, so they are never stored."""

    url: str = Field(description="grpc://host:8001, or grpcs:// for TLS")
    model_name: str | None = Field(default=None, description="default: the name that export-triton gave")
    headers: dict[str, str] = Field(default_factory=dict, repr=False)
    deadline_s: float = Field(default=60.0, gt=0, description="for one request")
    outage_s: float = Field(default=300.0, ge=0, description="how long rows wait for a server that went away")
    in_flight: int = Field(default=4, ge=1, description="requests in flight for each actor")


class JobSpec(Strict):
    """One run. Paths and URLs are strings as fsspec understands them; sizes in bytes, times in seconds."""

    sources: tuple[str, ...] = Field(min_length=1)
    model: str
    out: str
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    task: Literal["embed", "classify"] = "embed"
    features: tuple[FeatureName, ...] = ("cls", "pooled")
    labels: int = Field(default=0, ge=0, description="how many labels an image, best first; 0 for none")
    label_file: str | None = Field(default=None, description="names of the classes: one a line, or JSON id2label")
    feature_dtype: Literal["float32", "float16"] = "float32"
    dtype: DTypeName = "auto"
    decode: Literal["exact", "fast"] = "exact"
    image_size: ImageSize | None = Field(default=None, description="pixels: one number, or height and width")
    beit_final_norm: bool = Field(
        default=False, description="apply the trained final norm of a BEiT pre-training checkpoint"
    )
    zero_shot: tuple[str, ...] | None = Field(
        default=None, description="labels in the user's own words, for a model with a text tower"
    )
    templates: tuple[str, ...] | None = Field(
        default=None, description='sentences with {} where a label goes; default: "a photo of a {}."'
    )
    vocabulary: str | None = Field(default=None, description="the text tower's, where it is not beside the checkpoint")
    head: str | None = Field(default=None, description="a classifier that `probe` trained, in place of the model's")
    limit: Annotated[int, Field(ge=1)] | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    uri_column: str = "uri"
    image_column: str = "image"
    backend: Literal["torch", "triton", "null"] = "torch"
    triton: TritonSpec | None = None
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    actors: ActorRange | None = Field(default=None, description="default: one a GPU, or what the cores carry")
    gpus_per_actor: float = Field(default=0.0, ge=0)
    shard: Shard = WHOLE
    max_failure_rate: float = Field(default=1.0, ge=0, le=1)
    update: bool = False
    fetch: FetchSpec = FetchSpec()
    sink: SinkSpec = SinkSpec()
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False, exclude=True)

    @field_validator("features", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """Also `"cls,pooled"` or `"none"`, as the option takes them."""
        return [name for name in value.split(",") if name not in {"", "none"}] if isinstance(value, str) else value

    @field_validator("features")
    @classmethod
    def _in_order_once(cls, value: tuple[FeatureName, ...]) -> tuple[FeatureName, ...]:
        return tuple(name for name in FEATURE_NAMES if name in value)

    @model_validator(mode="after")
    def _asks_for_something(self) -> "JobSpec":
        if not all(source.strip().rpartition("://")[2] for source in self.sources):
            raise ValueError("a source is empty: a variable may be unset; the working directory is `.`")
        if self.gpus_per_actor > 1:
            raise ValueError(
                f"--gpus-per-actor {self.gpus_per_actor:g}: an actor computes on one GPU, and the others would idle. "
                "Take 1; without --actors there is an actor for each GPU"
            )
        if not self.features and not self.labels:
            raise ValueError("neither features nor labels are asked for: the output would hold no result")
        if self.label_file and not self.labels:
            raise ValueError("a label file is given, but no labels are asked for: add --labels K")
        if self.label_file and (self.zero_shot is not None or self.head is not None):
            raise ValueError("a label file names the model's own classes: leave it out with zero-shot labels or a head")
        if (self.backend == "triton") != (self.triton is not None):
            raise ValueError("backend triton needs --triton-url, and only it takes one")
        if self.zero_shot is not None and not self.labels:
            raise ValueError("zero-shot labels are given, but no labels are asked for; add --labels K, or use classify")
        if self.zero_shot is not None and self.backend != "torch":
            raise ValueError(f"zero-shot labels need --backend torch; a {self.backend} back end has no text tower")
        if self.zero_shot is None and (self.templates or self.vocabulary):
            raise ValueError("templates and a vocabulary are for zero-shot labels; give those with --zero-shot")
        if self.head is not None and (not self.labels or self.backend != "torch" or self.zero_shot is not None):
            raise ValueError("a head needs --labels K (or classify) and --backend torch, and no --zero-shot")
        others = [name for name in self.features if name not in VECTOR_NAMES]
        if others and self.backend != "torch":
            raise ValueError(f"backend {self.backend} gives cls and pooled only; leave out {', '.join(others)}")
        return self


# Fields that decide what stands in the output. Two runs may share a directory only if these agree.
RESULT_FIELDS = (
    "sources",
    "features",
    "labels",
    "feature_dtype",
    "decode",
    "image_size",
    "beit_final_norm",
    "zero_shot",
    "templates",
    "limit",
    "include",
    "exclude",
    "uri_column",
    "image_column",
)


# Files that may move, while what they hold, which is recorded by digest, may not change.
PLACE_FIELDS = ("vocabulary", "label_file", "head")
# What run.json keeps, so that a later command can run the same again. The revision is no result field: a branch and
# the commit it stands for are one model, and the model's digest tells which.
# So it is with how hard it was tried and where: `retry` does as the run did. An older run.json holds none of these.
EXECUTION_FIELDS = ("fetch", "sink", "backend", "triton", "batch_size", "gpus_per_actor", "max_failure_rate")
RECORDED_FIELDS = (*RESULT_FIELDS, *PLACE_FIELDS, "revision", *EXECUTION_FIELDS)


def build_spec(values: dict[str, Any]) -> JobSpec:
    """Validate `values` into a `JobSpec`; a task `classify` has 5 labels where they do not say how many.

    Raises SpecError naming each offending key, the rule it broke and, for an unknown key, the nearest known one.
    """
    if values.get("task") == "classify":
        values = {"labels": 5, **values}
    try:
        return JobSpec.model_validate(values)
    except ValidationError as error:
        raise SpecError("\n".join(explain(item, JobSpec) for item in error.errors())) from None


def parse_config(data: bytes, path: str) -> dict[str, Any]:
    """Values of a `--config` TOML file, read from `path`. Raises SpecError if it is not TOML."""
    try:
        return tomllib.loads(data.decode())
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"--config {path} is not TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise SpecError(
            f"--config {path} is not TOML, which is text in UTF-8: {error.reason} at {error.start}"
        ) from None

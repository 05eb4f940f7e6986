"""What is asked, and the directory it goes to: the model is read, the inputs are frozen, the two are compared."""

from functools import partial
from typing import Literal, NamedTuple

import pyarrow as pa

from pipeline.lock import Held
from pipeline.models import ModelInfo, choose_dtype, inspect_model, require_classes, with_head, with_labels
from pipeline.predictors.batches import Wanted
from pipeline.predictors.null import NULL_DIM
from pipeline.record import check_empty, check_same, freezing, new_record, read_record, require_record, write_record
from pipeline.sinks import intervals
from pipeline.sinks.compaction import recover
from pipeline.sinks.intervals import Spans
from pipeline.sinks.ledger import Ledger, pending, read_ledger, shard_rows
from pipeline.sources.manifest import (
    ManifestPart,
    part_named,
    read_schema,
    read_sources,
    require_parts,
    write_manifest,
)
from pipeline.sources.update import new_and_changed, replaced_rows
from pipeline.storage import Options
from schemas.errors import OutputError, SpecError
from schemas.preprocessing import Preprocessing
from schemas.run import ModelRecord, RunRecord
from schemas.spec import JobSpec
from schemas.tables import FeatureSize, feature_bytes, user_fields
from schemas.values import WHOLE, Shard

# Beside the weights in an actor: batches under way, Python and its libraries.
_BATCHES_BYTES = 256 << 20


class ResolvedJob(NamedTuple):
    """A spec with its model looked up: what is to be computed, in which precision. `info` is None without a model.
    `served_batch`: images that its Triton server takes at once, 0 without one."""

    spec: JobSpec
    info: ModelInfo | None
    wanted: Wanted
    dtype: str
    served_batch: int = 0

    @property
    def preprocessing(self) -> Preprocessing:
        return self.info.preprocessing if self.info else Preprocessing(resize=(1, 1))

    @property
    def pixel_bytes(self) -> int:
        """Bytes of one decoded picture; 0 where none is decoded."""
        height, width = self.preprocessing.output_size
        return height * width * 3 if self.info else 0

    @property
    def output_bytes(self) -> int:
        """Bytes of one picture's features."""
        return feature_bytes(self.wanted.fields)

    @property
    def model_bytes(self) -> int:
        """Memory an actor books: the weights in float32, as much again for them in the layout of a library, and what
        several batches are computed in. A server's client has no weights."""
        if self.info is None:
            return 1 << 20
        return _BATCHES_BYTES if self.spec.triton else 8 * self.info.parameters + _BATCHES_BYTES

    @property
    def image_gflop(self) -> float:
        """A rough cost of one picture, in billions of operations: every weight is used once for each patch."""
        if self.info is None:
            return 0.0
        down, across = self.info.network.grid(self.info.image_size)
        return 2e-9 * self.info.parameters * down * across


class Opened(NamedTuple):
    """A run's directory, ready to be filled. `schema` is that of the parts in `images/`; [`first`, `stop`) are the rows
    of the shard that it was opened for; `replaced` are rows whose object has a newer version in another row."""

    record: RunRecord
    parts: list[ManifestPart]
    schema: pa.Schema
    first: int
    stop: int
    replaced: Spans

    def pending(self, ledger: Ledger) -> Spans:
        """Rows of the shard that have come to no end."""
        return pending(ledger, self.first, self.stop, self.replaced)

    @property
    def current(self) -> Spans:
        """Rows of the shard that are to come to an end: those that are not replaced."""
        return intervals.complement(self.replaced, self.first, self.stop)

    def count(self, rows: Spans) -> int:
        """How many of `rows` are current."""
        return intervals.count(intervals.common(rows, self.current))


def resolve_job(spec: JobSpec) -> ResolvedJob:
    """Look up the model of `spec` and check that it can give what is asked.

    Raises CheckpointError for a model that cannot be had, SpecError for labels or features it does not have.
    """
    if spec.backend == "null":
        wanted = Wanted(spec.features, (NULL_DIM,) * len(spec.features), spec.feature_dtype, 0, (), False)
        return ResolvedJob(spec, None, wanted, "float32")
    info = inspect_model(
        spec.model,
        revision=spec.revision,
        image_size=spec.image_size,
        beit_final_norm=spec.beit_final_norm,
        label_file=spec.label_file if spec.labels else None,
        storage_options=spec.storage_options,
    )
    if spec.zero_shot is not None:
        info = with_labels(info, spec.zero_shot, spec.templates, spec.vocabulary)
    if spec.head is not None:
        info = _with_own_head(info, spec.head, spec.storage_options)
    if spec.labels and not info.num_labels:
        raise SpecError(
            f"labels are asked for, but {info.without_classifier}. "
            "Embed without --labels, use a fine-tuned checkpoint of the same model, or, if it has a text tower, say "
            "the labels with --zero-shot"
        )
    if spec.labels:
        require_classes(info)
    spec = _without_cls(spec, info) if "cls" in spec.features and not info.has_cls else spec
    if "visual_tokens" in spec.features and not info.network.visual_tokens:
        raise SpecError(
            f"--features visual_tokens: {spec.model} ({info.architecture}) has no head that predicts visual tokens; a "
            "BEiT pre-training checkpoint such as microsoft/beit-large-patch16-224-pt22k has one"
        )
    sizes = _feature_sizes(info)
    dims = tuple(sizes[name] for name in spec.features)
    top = min(spec.labels, info.num_labels)
    wanted = Wanted(spec.features, dims, spec.feature_dtype, top, info.labels, info.multi_label)
    if spec.triton:
        from pipeline.predictors.triton import served_model

        served = served_model(info, wanted, spec.triton, spec.dtype)
        return ResolvedJob(spec, info, wanted, served.dtype, served.max_batch_size)
    return ResolvedJob(spec, info, wanted, _dtype(spec))


def _with_own_head(info: ModelInfo, head: str, storage_options: Options) -> ModelInfo:
    from pipeline.retrieval.head import read_head

    linear, record, digest = read_head(head, storage_options)
    feature: Literal["cls", "pooled"] = "cls" if record.feature == "cls" else "pooled"
    width = info.vector_sizes[feature]
    trained = (record.model.digest, record.model.preprocessing, record.model.pooled, record.feature, record.dim)
    if trained != (info.digest, info.preprocessing, info.pooled, feature, width):
        raise SpecError(
            f"--head {head}: trained on `{record.feature}` of {record.model.name} ({record.model.digest[:12]}, images "
            f"of {record.model.preprocessing.output_size}), but the model here is {info.name} ({info.digest[:12]}, "
            f"images of {info.preprocessing.output_size}); give the model and image size that it was trained on"
        )
    return with_head(info, tuple(record.labels), linear.weight, linear.bias, feature, digest)


def _feature_sizes(info: ModelInfo) -> dict[str, FeatureSize]:
    down, across = info.network.grid(info.image_size)
    return {
        **info.vector_sizes,
        "patches": (down * across, info.hidden_size),
        "visual_tokens": down * across,
    }


def _without_cls(spec: JobSpec, info: ModelInfo) -> JobSpec:
    """A model without a CLS token gives `pooled` where nothing else was asked; asking for `cls` is an error."""
    if "features" in spec.model_fields_set:
        raise SpecError(f"{spec.model} ({info.architecture}) has no CLS token; ask for --features pooled")
    return spec.model_copy(update={"features": ("pooled",)})


def _dtype(spec: JobSpec) -> str:
    """The precision of the run. Where GPUs do the work it is settled without looking for one here: the machine that
    starts a job often has none. An actor on a GPU that is too old for bfloat16 says so when it starts."""
    if spec.gpus_per_actor:
        if spec.dtype == "int8":
            raise SpecError("--dtype int8 is for CPUs; on GPUs use float8 (sm89 and later), bfloat16 or auto")
        return "bfloat16" if spec.dtype == "auto" else spec.dtype
    return choose_dtype(spec.dtype, cuda=False)


def open_directory(resolved: ResolvedJob) -> Opened:
    """Create the run under `spec.out`, or open the one that is there; with `--update`, take up what is new.

    Raises OutputError when the directory holds another computation, SourceError when nothing matches, SpecError for an
    update by one of several shards.
    """
    spec = resolved.spec
    if spec.update and spec.shard.count > 1:
        raise SpecError(
            "--update with --shard: an update adds to the manifest, which all shards must cut alike. Run --update once "
            "without --shard (it may be interrupted as soon as it has listed), then the shards without --update"
        )
    dims = dict(zip(resolved.wanted.features, resolved.wanted.dims, strict=True))
    wanted = new_record(spec, _model_record(resolved), dims)
    found = read_record(spec.out, spec.storage_options)
    listed = False
    if found is None:
        check_empty(spec.out, spec.storage_options)
        with freezing(spec.out, spec.storage_options) as mine:
            if mine:
                listed = True
                parts = write_manifest(read_sources(spec), spec.out, spec.storage_options, check=mine.check)
                _freeze(spec, mine, _with_parts(wanted, parts, base=len(parts)), parts)
        found = read_record(spec.out, spec.storage_options)
    if found is None:
        raise OutputError(f"{spec.out}/run.json vanished while the run was being set up; run the command again")
    check_same(found, wanted, spec.out)
    if spec.update and not listed:
        found = _update(resolved)
    return reopen(spec.out, found, spec.storage_options, spec.shard)


def reopen(out: str, record: RunRecord, storage_options: Options, shard: Shard = WHOLE) -> Opened:
    """Gather what a recorded run consists of."""
    parts = [part_named(name) for name in record.manifest_parts]
    user = user_fields(read_schema(out, parts[0], storage_options))
    first, stop = shard_rows(record.manifest_rows, shard.index, shard.count)
    replaced = replaced_rows(out, parts[record.base_parts :], storage_options)
    return Opened(record, parts, record.images_schema(user), first, stop, intervals.from_rows(replaced))


def _update(resolved: ResolvedJob) -> RunRecord:
    spec = resolved.spec
    with freezing(spec.out, spec.storage_options, again=True) as mine:
        assert mine is not None
        # Read anew: another job may just have added what there was to add.
        record = require_record(spec.out, spec.storage_options)
        known = [part_named(name) for name in record.manifest_parts]
        # In the midst of a swap images are out of sight: they would be taken up again under a new signature.
        recover(spec.out, spec.storage_options)
        images = read_ledger(spec.out, spec.storage_options).images
        done = partial(intervals.contains, images)
        fresh = new_and_changed(read_sources(spec), spec.out, known, done, spec.storage_options)
        schema = read_schema(spec.out, known[0], spec.storage_options)
        added = write_manifest(
            fresh, spec.out, spec.storage_options, first_row=record.manifest_rows, schema=schema, check=mine.check
        )
        if not added:
            return record
        updated = _with_parts(record, [*known, *added], base=record.base_parts)
        _freeze(spec, mine, updated, added)
    return updated


def _freeze(spec: JobSpec, mine: Held, record: RunRecord, written: list[ManifestPart]) -> None:
    """Write the record that names the parts just `written`. Raises OutputError where somebody else has the lock by now,
    or had it meanwhile and removed them."""
    mine.check()
    require_parts(spec.out, written, spec.storage_options)
    write_record(spec.out, record, spec.storage_options)


def _with_parts(record: RunRecord, parts: list[ManifestPart], base: int) -> RunRecord:
    changes = {
        "manifest_rows": parts[-1].stop if parts else 0,
        "manifest_parts": [part.name for part in parts],
        "base_parts": base,
    }
    return record.model_copy(update=changes)


def _model_record(resolved: ResolvedJob) -> ModelRecord:
    info = resolved.info
    if info is None:
        return ModelRecord(
            name="null", family="null", architecture="null", digest="null", dtype="float32", hidden_size=NULL_DIM,
            num_labels=0, pooled="null", preprocessing=resolved.preprocessing,
        )  # fmt: skip
    return ModelRecord(
        name=info.name,
        revision=info.revision,
        family=info.family,
        architecture=info.architecture,
        digest=info.digest,
        dtype=resolved.dtype,
        hidden_size=info.hidden_size,
        num_labels=info.num_labels,
        pooled=info.pooled,
        multi_label=info.multi_label,
        zero_shot=info.zero_shot.digest if info.zero_shot else None,
        head=info.head.digest if info.head else None,
        preprocessing=info.preprocessing,
        label_digest=info.label_digest,
    )

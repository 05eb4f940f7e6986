"""The table of everything that loads. A new format is one file in `formats/` and one row here."""

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.models.formats import (
    hf_beit,
    hf_clip,
    hf_data2vec,
    hf_deit,
    hf_dinov2,
    hf_mae,
    hf_msn,
    hf_text,
    hf_vit,
    npz_hybrid,
    npz_mixer,
    npz_text,
    npz_vit,
    timm_beit,
    timm_hybrid,
    timm_mixer,
    timm_vit,
)
from pipeline.models.formats.format import Config, Format, Shapes
from pipeline.models.text_architecture import TextFormat
from schemas.errors import CheckpointError
from schemas.redaction import named

FORMATS: tuple[Format, ...] = (
    hf_vit.FORMAT,
    hf_beit.FORMAT,
    hf_deit.FORMAT,
    hf_dinov2.FORMAT,
    hf_mae.FORMAT,
    hf_msn.FORMAT,
    hf_clip.CLIP,
    hf_clip.SIGLIP,
    hf_data2vec.FORMAT,
    timm_hybrid.FORMAT,  # before timm's ViT, by whose names it goes
    timm_vit.FORMAT,
    timm_beit.FORMAT,
    timm_mixer.FORMAT,
    npz_vit.FORMAT,
    npz_hybrid.FORMAT,
    npz_mixer.FORMAT,
)

# Text towers beside an image tower of the table above.
TEXT_FORMATS: tuple[TextFormat, ...] = (
    hf_text.CLIP,
    hf_text.SIGLIP,
    npz_text.TRANSFORMER,
    npz_text.BERT_TOWER,
)


def recognise(config: Config, shapes: Shapes, where: str) -> tuple[Format, str]:
    """The format of a checkpoint, and why it is taken for it. Raises CheckpointError if none fits."""
    for candidate in FORMATS:
        reason = candidate.recognise(config, shapes)
        if reason:
            return candidate, reason
    given = config.get("architecture") or config.get("model_type") or "no model_type in config.json"
    known = ", ".join(sorted({f"{row.family} ({row.layout})" for row in FORMATS}))
    raise CheckpointError(
        f"{where}: this checkpoint is of a family that is not supported ({given}). Supported are: {known}."
    )


@contextmanager
def described_as(family: str, where: str) -> Iterator[None]:
    """What the description of a checkpoint stumbles over in the block, such as an array of another rank, is a fault of
    the checkpoint: raises CheckpointError in its place."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: its tensors or its config are not those of {family} ({named(error)}). Fetch it "
            "again, or convert it again from where it came"
        ) from error


def recognise_text(config: Config, shapes: Shapes) -> tuple[TextFormat, str] | None:
    """The format of a checkpoint's text tower, and why it is taken for it; None without one."""
    for candidate in TEXT_FORMATS:
        reason = candidate.recognise(config, shapes)
        if reason:
            return candidate, reason
    return None

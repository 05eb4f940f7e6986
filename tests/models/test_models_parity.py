"""Every family against its reference library: CLS, pooled and logits on real photographs, in float32 and bfloat16."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.checkpoints import (
    KINDS,
    OTHER_KINDS,
    Expected,
    make_checkpoint,
    preprocessed,
    reference_outputs,
    saved_tensors,
    spread_out,
    worst_cosine,
    worst_error,
)
from support.testdata import needs_testdata, photos, trained_vit

from pipeline.models import Outputs, inspect_model, load_model
from schemas.errors import CheckpointError
from schemas.preprocessing import Preprocessing

pytestmark = needs_testdata

FLOAT32_ERROR = 1e-4
FLOAT32_COSINE = 0.99999
BFLOAT16_COSINE = 0.999


def compare(ours: Outputs, theirs: Expected, dtype: torch.dtype) -> None:
    pairs = {
        "cls": (ours.cls, theirs.cls),
        "pooled": (ours.pooled, theirs.pooled),
        "logits": (ours.logits, theirs.logits),
    }
    if ours.cls is None:
        del pairs["cls"]
    for name, (got, expected) in pairs.items():
        if expected is None:
            assert got is None, name
            continue
        assert got is not None, name
        assert got.dtype == torch.float32
        assert got.shape == expected.shape
        cosine = worst_cosine(got, expected)
        if dtype == torch.float32:
            assert worst_error(got, expected) < FLOAT32_ERROR, name
            assert cosine > FLOAT32_COSINE, name
        else:
            assert cosine > BFLOAT16_COSINE, (name, cosine)


@pytest.mark.parametrize("kind", KINDS | OTHER_KINDS)
def test_matches_transformers(kind: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / kind, kind)
    pixels, values = preprocessed(folder, photos(2))
    expected = reference_outputs(folder, values)
    info = inspect_model(str(folder))
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(info, dtype=dtype)
        compare(model(pixels), expected, dtype)
    plain = load_model(info, packed=False)
    compare(plain(pixels), expected, torch.float32)
    full = plain.last_hidden_state(pixels)
    assert worst_error(full.flatten(0, 1), expected.tokens.flatten(0, 1)) < FLOAT32_ERROR


# A family each; BEiT with a table for each block and with one for all, DINOv2 with SwiGLU too.
FROM_MEMORY = (
    *("vit", "vit-classifier", "beit", "beit-classifier", "beit-mim", "deit-distilled", "mae", "msn-classifier"),
    *("dinov2-classifier", "dinov2-registers", "data2vec-classifier", "clip", "siglip"),
)


@pytest.mark.parametrize("kind", FROM_MEMORY)
def test_names_that_transformers_has_in_memory(kind: str, tmp_path: Path) -> None:
    """A state dict does not hold the names that `save_pretrained` writes, which are those of older versions."""
    folder = make_checkpoint(tmp_path / kind, kind)
    pixels, values = preprocessed(folder, photos(2))
    expected = reference_outputs(folder, values)
    model = getattr(transformers, (KINDS | OTHER_KINDS)[kind].saved).from_pretrained(folder)
    saved = set(saved_tensors(folder))
    save_file(model.state_dict(), folder / "model.safetensors")
    assert (set(saved_tensors(folder)) == saved) == kind.startswith(("data2vec", "clip", "siglip"))
    compare(load_model(inspect_model(str(folder)))(pixels), expected, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit-classifier", "beit-mim", "beit-classifier"])
def test_matches_transformers_at_base_size(kind: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / kind, kind, size="base")
    pixels, values = preprocessed(folder, photos(1))
    expected = reference_outputs(folder, values)
    info = inspect_model(str(folder))
    for dtype in (torch.float32, torch.bfloat16):
        compare(load_model(info, dtype=dtype)(pixels), expected, dtype)


# A family each, with a classifier where there is one.
AT_ANOTHER_RESOLUTION = (
    "vit",
    "vit-classifier",
    "beit-cls",
    "beit-classifier",
    "beit-mim",
    "beit-absolute",
    "mae",
    "msn-classifier",
    "clip",
    "clip-projection",
    "siglip",
    "deit-classifier",
    "deit-distilled",
    "dinov2-classifier",
    "dinov2-registers",
    "dinov2-registers-classifier",
    "data2vec-classifier",
)


@pytest.mark.parametrize("kind", AT_ANOTHER_RESOLUTION)
@pytest.mark.parametrize(
    ("size", "dtypes"),
    [((336, 336), (torch.float32,)), ((112, 224), (torch.float32, torch.bfloat16))],
    ids=["336x336", "112x224"],
)
def test_matches_transformers_at_another_resolution(
    kind: str, size: tuple[int, int], dtypes: tuple[torch.dtype, ...], tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / kind, kind)
    pixels, values = resized(folder, size)
    expected = reference_outputs(folder, values, interpolate=True)
    info = inspect_model(str(folder), image_size=size)
    assert info.image_size == size
    for dtype in dtypes:
        compare(load_model(info, dtype=dtype)(pixels), expected, dtype)


def resized(folder: Path, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two photos at exactly `size`, whatever the processor would crop."""
    return preprocessed(folder, photos(2), size={"height": size[0], "width": size[1]}, do_center_crop=False)


def test_trained_final_norm_of_beit_is_applied_when_asked(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "beit", "beit-mim")
    pixels, values = preprocessed(folder, photos(2))
    reference = transformers.BeitForMaskedImageModeling.from_pretrained(folder).eval()
    with torch.no_grad():
        tokens = reference.layernorm(reference.beit(values).last_hidden_state)
    info = inspect_model(str(folder), beit_final_norm=True)
    outputs = load_model(info)(pixels)
    assert info.pooled == "mean_patch_tokens"
    assert outputs.cls is not None
    assert worst_error(outputs.cls, tokens[:, 0]) < FLOAT32_ERROR
    assert worst_error(outputs.pooled, tokens[:, 1:].mean(dim=1)) < FLOAT32_ERROR
    plain = load_model(inspect_model(str(folder)))(pixels)
    assert worst_error(plain.pooled, outputs.pooled) > 0.01


def top1(preprocessing: Preprocessing | None = None) -> float:
    """Share of the 200 photos whose best label is the one in the file name."""
    info = inspect_model(str(trained_vit()))
    if preprocessing is not None:
        from dataclasses import replace

        info = replace(info, preprocessing=preprocessing)
    files = photos()
    pixels, _ = preprocessed(trained_vit(), files)
    synsets = (trained_vit().parents[1] / "labels" / "timm_imagenet_synsets.txt").read_text().split()
    logits = load_model(info)(pixels).logits
    assert logits is not None
    right = [synsets[int(best)] == path.name.split("_")[0] for best, path in zip(logits.argmax(1), files, strict=True)]
    return sum(right) / len(right)


@pytest.mark.slow
def test_trained_vit_labels_the_photos() -> None:
    """transformers in float32 gives 0.84 on these photos."""
    assert top1() >= 0.83


@pytest.mark.slow
def test_wrong_normalisation_shows() -> None:
    imagenet = Preprocessing(resize=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert top1(imagenet) < 0.7


def test_a_size_that_is_no_multiple_of_a_patch(tmp_path: Path) -> None:
    """As SigLIP So400m/14 at 384: the pixels that make no whole patch do not count."""
    folder = make_checkpoint(tmp_path / "siglip", "siglip", image_size=90)
    pixels, values = preprocessed(folder, photos(2))
    info = inspect_model(str(folder))
    assert info.image_size == (90, 90)
    compare(load_model(info)(pixels), reference_outputs(folder, values), torch.float32)
    with pytest.raises(CheckpointError, match=r"--image-size 96 or 112"):
        inspect_model(str(folder), image_size=100)


@pytest.mark.parametrize("family", ["Siglip", "CLIP"])
def test_a_classifier_of_an_image_tower_reads_the_mean_of_the_patches(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / family, family.lower())
    tower = getattr(transformers, f"{family}VisionConfig").from_pretrained(folder).to_dict()
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    texts = {**small, "vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1}
    config = getattr(transformers, f"{family}Config")(text_config=texts, vision_config=tower, num_labels=37)
    reference = getattr(transformers, f"{family}ForImageClassification")(config).eval()
    spread_out(reference, 0)
    reference.save_pretrained(folder)
    unread = {"Siglip": "vision_model.head.probe", "CLIP": "vision_model.post_layernorm.weight"}
    assert unread[family] in saved_tensors(folder), "which nothing reads"
    pixels, values = preprocessed(folder, photos(2))
    with torch.no_grad():
        theirs = reference(values)
    info = inspect_model(str(folder))
    assert (info.pooled, info.num_labels) == ("mean_patch_tokens", 37)
    ours = load_model(info)(pixels)
    assert ours.logits is not None
    assert worst_error(ours.logits, theirs.logits) < FLOAT32_ERROR

"""Attention rollout against NumPy on the reference library's own attention weights."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.checkpoints import make_checkpoint, make_timm_checkpoint, preprocessed, spread_out
from support.npz import mixer_arrays_of
from support.testdata import needs_testdata, photos, trained_vit

from pipeline.models import inspect_model, load_model
from pipeline.models.attention import Rollout, attention_rollout, rollout_origin

Floats = npt.NDArray[np.float64]


def numpy_rollout(attentions: list[Floats]) -> Floats:
    """(B, T, T) from the weights (B, heads, T, T) of each layer: Abnar and Zuidema's equation 1."""
    tokens = attentions[0].shape[-1]
    rollout = np.broadcast_to(np.eye(tokens), attentions[0][:, 0].shape)
    for weights in attentions:
        mixed = weights.mean(axis=1) + np.eye(tokens)
        mixed = mixed / mixed.sum(axis=-1, keepdims=True)
        rollout = mixed @ rollout
    return rollout


@torch.no_grad()
def reference_attentions(folder: Path, model_class: str, values: torch.Tensor, **options: object) -> list[Floats]:
    import transformers

    model = getattr(transformers, model_class).from_pretrained(folder, attn_implementation="eager").eval()
    return [layer.double().numpy() for layer in model(values, output_attentions=True, **options).attentions]


@needs_testdata
@pytest.mark.parametrize(
    ("kind", "model_class", "origin", "prefix"),
    [
        ("vit", "ViTModel", "cls", 1),
        ("beit", "BeitModel", "mean", 1),
        ("beit-mim", "BeitModel", "mean", 1),
        ("beit-cls", "BeitModel", "cls", 1),
        ("deit-distilled", "DeiTModel", "cls", 2),
        ("dinov2-registers", "Dinov2WithRegistersModel", "cls", 5),
        ("siglip", "SiglipVisionModel", "mean", 0),
    ],
)
def test_matches_numpy_on_the_attentions_of_transformers(
    kind: str, model_class: str, origin: str, prefix: int, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / kind, kind)
    pixels, values = preprocessed(folder, photos(2))
    whole = numpy_rollout(reference_attentions(folder, model_class, values))
    rows = whole[:, 0] if origin == "cls" else whole[:, prefix:].mean(axis=1)
    expected = rows[:, prefix:].reshape(2, 14, 14)
    info = inspect_model(str(folder))
    assert rollout_origin(info.network) == origin
    for packed in (False, True):
        got = attention_rollout(load_model(info, packed=packed), pixels).numpy()
        assert got.shape == (2, 14, 14)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)
    # The map says something: it is not flat, and not the same for both pictures.
    assert expected.max() > 1.2 * expected.min()
    assert np.abs(expected[0] - expected[1]).max() > 1e-4


@needs_testdata
def test_a_classifier_that_reads_the_mean_of_the_patches(tmp_path: Path) -> None:
    """CLIP's, which has no norm behind the pooling."""
    import transformers

    folder = make_checkpoint(tmp_path / "clip", "clip")
    tower = transformers.CLIPVisionConfig.from_pretrained(folder).to_dict()
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    texts = {**small, "vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig(text_config=texts, vision_config=tower, num_labels=37)
    reference = transformers.CLIPForImageClassification(config)
    spread_out(reference, 0)
    reference.save_pretrained(folder)
    pixels, values = preprocessed(folder, photos(2))
    whole = numpy_rollout(reference_attentions(folder, "CLIPForImageClassification", values))
    info = inspect_model(str(folder))
    assert rollout_origin(info.network) == "mean"
    got = attention_rollout(load_model(info), pixels).numpy()
    np.testing.assert_allclose(got, whole[:, 1:, 1:].mean(axis=1).reshape(2, 14, 14), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("pooling", "origin"), [("avg", "mean"), ("token", "cls")])
def test_timm_without_a_norm_behind_the_pooling(pooling: str, origin: str, tmp_path: Path) -> None:
    small = {"embed_dim": 64, "depth": 1, "num_heads": 2, "num_classes": 3}
    make_timm_checkpoint(tmp_path, "vit_tiny_patch16_224", **small, global_pool=pooling, fc_norm=False)
    info = inspect_model(str(tmp_path))
    assert info.pooled == "mean_patch_tokens"
    assert rollout_origin(info.network) == origin


@needs_testdata
def test_another_resolution_that_is_not_square(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "beit", "beit")
    size = {"height": 224, "width": 320}
    pixels, values = preprocessed(folder, photos(1), size=size, do_center_crop=False)
    whole = numpy_rollout(reference_attentions(folder, "BeitModel", values))
    info = inspect_model(str(folder), image_size=(224, 320))
    got = Rollout(info, {})(pixels[0].numpy())
    assert got.shape == (14, 20)
    np.testing.assert_allclose(got, whole[0, 1:, 1:].mean(axis=0).reshape(14, 20), rtol=1e-4, atol=1e-7)


@needs_testdata
def test_a_trained_model_and_what_is_left_behind() -> None:
    """No hook stays: features after a rollout are those before."""
    folder = trained_vit()
    pixels, values = preprocessed(folder, photos(2))
    whole = numpy_rollout(reference_attentions(folder, "ViTForImageClassification", values))
    model = load_model(inspect_model(str(folder)))
    before = model(pixels).pooled
    got = attention_rollout(model, pixels)
    np.testing.assert_allclose(got.numpy(), whole[:, 0, 1:].reshape(2, 14, 14), rtol=1e-4, atol=1e-7)
    assert torch.equal(model(pixels).pooled, before)
    assert not any(block._forward_pre_hooks for block in model.trunk.blocks)


def test_a_mixer_has_none(tmp_path: Path) -> None:
    from timm.models.mlp_mixer import MlpMixer

    from pipeline.attention import AttentionMaps, check_attention
    from schemas.errors import SpecError
    from schemas.spec import build_spec

    theirs = MlpMixer(patch_size=16, embed_dim=32, num_blocks=1, num_classes=0)
    np.savez(tmp_path / "model.npz", **mixer_arrays_of(theirs))
    info = inspect_model(str(tmp_path))
    with pytest.raises(ValueError, match="no attention"):
        attention_rollout(load_model(info), torch.zeros(1, 224, 224, 3, dtype=torch.uint8))
    spec = build_spec({"sources": ["x"], "model": str(tmp_path), "out": str(tmp_path / "o")})
    with pytest.raises(SpecError, match="MLP-Mixer, which has no attention"):
        check_attention(spec, AttentionMaps("maps", 4))

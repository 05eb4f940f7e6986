"""timm's config.json: what it says of pixels and of the network, read as timm itself reads it."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import make_timm_checkpoint, timm_outputs, timm_preprocessed, transformers, worst_error
from support.testdata import needs_testdata, photos
from timm.data import resolve_data_config
from timm.models._hub import _parse_model_cfg

from pipeline.models import inspect_model, load_model, read_preprocessing
from pipeline.models.formats.timm import EXAMPLE_CONFIG, trained_with_quick_gelu
from pipeline.models.formats.timm_vit import is_clip_embedding
from schemas.errors import CheckpointError
from schemas.preprocessing import Preprocessing

SMALL = {"embed_dim": 96, "depth": 2, "num_heads": 4, "num_classes": 37}
PUBLISHED = {
    **{"input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"},
    **{"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "fixed_input_size": True, "num_classes": 37},
}


def edit(folder: Path, **values: Any) -> dict[str, Any]:
    """Put `values` into config.json; returns the whole."""
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text()) | values
    path.write_text(json.dumps(config))
    return config


def timm_data_config(config: dict[str, Any]) -> dict[str, Any]:
    """What timm's transform is made from."""
    published, _, _ = _parse_model_cfg(copy.deepcopy(config), {})
    return dict(resolve_data_config(pretrained_cfg=published))


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize(
    "made_with",
    [
        *({}, {"img_size": 96}, {"img_size": [96, 160]}, {"img_size": None}),
        *({"img_size": 96, key: value} for key in ("dynamic_img_size", "use_naflex") for value in (True, False)),
        *({"img_size": 96, "strict_img_size": value} for value in (True, False, None)),
    ],
)
def test_pixels_are_of_the_size_that_timm_takes(fixed: bool, made_with: dict[str, Any], tmp_path: Path) -> None:
    published = {**PUBLISHED, "fixed_input_size": fixed}
    config = {"architecture": "vit_base_patch16_224", "model_args": made_with, "pretrained_cfg": published}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_preprocessing(tmp_path).output_size == tuple(timm_data_config(config)["input_size"][1:])


@needs_testdata
def test_a_model_made_for_another_size_than_was_published(tmp_path: Path) -> None:
    reference = make_timm_checkpoint(tmp_path, "vit_base_patch16_224", **SMALL, img_size=96)
    pixels, values = timm_preprocessed(reference, photos(2))
    expected = timm_outputs(reference, values)
    published = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    edit(tmp_path, pretrained_cfg={**published, "input_size": [3, 224, 224], "fixed_input_size": True})
    info = inspect_model(str(tmp_path))
    assert info.image_size == tuple(values.shape[2:]) == (96, 96)
    ours = load_model(info)(pixels)
    assert ours.logits is not None
    assert worst_error(ours.logits, expected.logits) < 1e-4


@needs_testdata
@pytest.mark.parametrize("architecture", ["vit_base_patch16_224", "beit_base_patch16_224"])
def test_a_config_in_one_piece(architecture: str, tmp_path: Path) -> None:
    """As timm's first models on the hub have it: no `pretrained_cfg`, its keys beside `architecture`."""
    made_with = {"embed_dim": 192, "depth": 2, "num_heads": 3, "num_classes": 3, "img_size": 96}
    reference = make_timm_checkpoint(tmp_path, architecture, **made_with, published={"mean": (0.5, 0.4, 0.3)})
    today = json.loads((tmp_path / "config.json").read_text())
    config = {**today["pretrained_cfg"], "architecture": architecture, "labels": ["a", "b", "c"], "num_features": 192}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = timm_data_config(config)
    pixels, values = timm_preprocessed(reference, photos(2))
    info = inspect_model(str(tmp_path))
    assert info.image_size == tuple(theirs["input_size"][1:])
    assert (info.preprocessing.mean, info.preprocessing.std) == (tuple(theirs["mean"]), tuple(theirs["std"]))
    assert info.labels == ("a", "b", "c")
    assert info.preprocessing == read_preprocessing_of(today, tmp_path / "today")
    ours, expected = load_model(info)(pixels), timm_outputs(reference, values)
    assert ours.logits is not None
    assert worst_error(ours.logits, expected.logits) < 1e-4


@needs_testdata
@pytest.mark.parametrize("architecture", ["vit_medium_patch16_gap_256", "vit_so150m_patch16_reg4_gap_256"])
def test_a_network_without_cls_pools_by_mean_where_the_config_does_not_say(architecture: str, tmp_path: Path) -> None:
    reference = make_timm_checkpoint(tmp_path, architecture, **SMALL)
    pixels, values = timm_preprocessed(reference, photos(2))
    edit(tmp_path, global_pool=None, model_args=SMALL)
    ours, expected = load_model(inspect_model(str(tmp_path)))(pixels), timm_outputs(reference, values)
    assert ours.logits is not None
    assert worst_error(ours.logits, expected.logits) < 1e-4
    edit(tmp_path, global_pool="token")
    with pytest.raises(CheckpointError, match="'token' reads the CLS token, and there is no cls_token; say"):
        inspect_model(str(tmp_path))


@needs_testdata
def test_another_width_keeps_the_heads_that_the_architecture_has(tmp_path: Path) -> None:
    made_with = {"embed_dim": 384, "depth": 2, "num_classes": 37}
    reference = make_timm_checkpoint(tmp_path, "vit_base_patch16_224", **made_with)
    pixels, values = timm_preprocessed(reference, photos(2))
    with pytest.raises(CheckpointError, match=r"number of heads of vit_base_patch16_224 at width 384 is unknown.*timm"):
        inspect_model(str(tmp_path))
    edit(tmp_path, model_args={**made_with, "num_heads": 12})
    ours, expected = load_model(inspect_model(str(tmp_path)))(pixels), timm_outputs(reference, values)
    assert ours.logits is not None
    assert worst_error(ours.logits, expected.logits) < 1e-4
    make_timm_checkpoint(tmp_path / "gap", "vit_base_patch16_gap_224", **made_with)
    assert inspect_model(str(tmp_path / "gap")).network.heads == 16
    make_timm_checkpoint(tmp_path / "own", "vit_small_patch16_224", **made_with)
    assert inspect_model(str(tmp_path / "own")).network.heads == 6, "the width that its name stands for"


@pytest.mark.parametrize("architecture", ["vit_small_patch16_224", "vit_base_patch32_clip_224"])
def test_epsilon_of_a_network_with_a_norm_before_its_blocks(architecture: str, tmp_path: Path) -> None:
    reference = make_timm_checkpoint(tmp_path, architecture, **SMALL, pre_norm=True)
    assert inspect_model(str(tmp_path)).network.epsilon == reference.norm_pre.eps == reference.blocks[0].norm1.eps


@needs_testdata
@pytest.mark.parametrize("architecture", ["vit_base_patch16_224", "vit_base_patch16_siglip_224"])
def test_a_norm_behind_the_attention_pool(architecture: str, tmp_path: Path) -> None:
    reference = make_timm_checkpoint(tmp_path, architecture, **SMALL, global_pool="map", fc_norm=True)
    pixels, values = timm_preprocessed(reference, photos(2))
    ours, expected = load_model(inspect_model(str(tmp_path)))(pixels), timm_outputs(reference, values)
    assert ours.logits is not None
    assert worst_error(ours.pooled, expected.pooled) < 1e-4
    assert worst_error(ours.logits, expected.logits) < 1e-4


def read_preprocessing_of(config: dict[str, Any], folder: Path) -> Preprocessing:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return read_preprocessing(folder)


def test_what_to_write_for_weights_without_a_config(tmp_path: Path) -> None:
    """As Microsoft published BEiT, with two biases and a count of positions; what the error says to write is enough."""
    architecture = json.loads(EXAMPLE_CONFIG)["architecture"]
    make_timm_checkpoint(tmp_path, architecture, depth=1, num_classes=37)
    whole = inspect_model(str(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).unlink()
    path = tmp_path / "beit_ft.pth"
    torch.save({"model": {**tensors, "blocks.0.attn.relative_position_index": torch.zeros(197, 197, dtype=int)}}, path)
    with pytest.raises(CheckpointError, match=r"config\.json: no such file\..* such as \{") as error:
        inspect_model(str(path))
    (tmp_path / "config.json").write_text(f"{{{str(error.value).partition('{')[2]}")
    info = inspect_model(str(path))
    assert (info.network, info.preprocessing) == (whole.network, whole.preprocessing)
    load_model(info)
    page = Path(__file__).parents[2] / "docs/checkpoints.md"
    assert EXAMPLE_CONFIG in " ".join(page.read_text().split())
    torch.save({"model": {**tensors, "lm_head.weight": torch.zeros(8192, 768)}}, path)
    with pytest.raises(CheckpointError, match=r"Hugging Face's layout, such as microsoft/beit-base-patch16-224-pt22k"):
        inspect_model(str(path))


def test_a_config_in_one_piece_must_say_all_of_its_pixels(tmp_path: Path) -> None:
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="pretrained_cfg lacks input_size, interpolation; take them"):
        read_preprocessing(tmp_path)


def test_the_final_norm_is_for_beit_as_transformers_saves_it(tmp_path: Path) -> None:
    make_timm_checkpoint(tmp_path, "beit_base_patch16_224", **SMALL)
    assert not inspect_model(str(tmp_path)).beit_final_norm
    with pytest.raises(CheckpointError, match="a BEiT of timm has no trained final norm that is left out; drop"):
        inspect_model(str(tmp_path), beit_final_norm=True)


def published_clip_towers() -> dict[str, dict[str, Any]]:
    """architecture.tag → config.json of timm's CLIP towers, as it is on the hub."""
    import timm

    found = {}
    for name in timm.list_pretrained("vit_*_clip_*"):
        published = timm.get_pretrained_cfg(name).to_dict(remove_source=True)
        architecture = name.partition(".")[0]
        found[name] = {"architecture": architecture, "pretrained_cfg": published, **published}
    assert len(found) > 60
    return found


def test_published_clip_towers_and_their_classifiers_are_told_apart() -> None:
    from timm.models import create_model

    widths = {}
    for name, config in published_clip_towers().items():
        architecture = config["architecture"]
        if architecture not in widths:
            with torch.device("meta"):
                widths[architecture] = create_model(architecture, depth=1, weight_init="skip").embed_dim
        assert is_clip_embedding(config, widths[architecture]) == ("_ft_" not in name), name


@needs_testdata
@pytest.mark.parametrize("architecture", ["vit_base_patch16_224", "beit_base_patch16_224"])
def test_what_transformers_saves_of_a_model_of_timm(architecture: str, tmp_path: Path) -> None:
    model = make_timm_checkpoint(tmp_path / "timm", architecture, **SMALL)
    made_with = {key: value for key, value in SMALL.items() if key != "num_classes"}  # those transformers says itself
    edit(tmp_path / "timm", model_args=made_with, label_names=(names := [f"kind {i}" for i in range(37)]))
    reference = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "timm").eval()
    reference.save_pretrained(tmp_path / "saved")
    pixels, values = timm_preprocessed(model, photos(2))
    with torch.no_grad():
        expected = reference(values).logits
    whole = inspect_model(str(tmp_path / "timm"))
    for in_memory in (False, True):
        if in_memory:
            save_file(reference.state_dict(), tmp_path / "saved/model.safetensors")
        info = inspect_model(str(tmp_path / "saved"))
        assert (info.family, info.preprocessing, info.network) == (whole.family, whole.preprocessing, whole.network)
        assert list(info.labels) == names
        ours = load_model(info)(pixels)
        assert ours.logits is not None
        assert worst_error(ours.logits, expected) < 1e-4
    transformers.AutoModel.from_pretrained(tmp_path / "timm").save_pretrained(tmp_path / "body")
    assert inspect_model(str(tmp_path / "body")).num_labels == 0
    edit(tmp_path / "saved", architecture="resnet50")
    with pytest.raises(CheckpointError, match=r"a family that is not supported \(resnet50\)"):
        inspect_model(str(tmp_path / "saved"))


@pytest.mark.parametrize("where", ["beside", "within"])
def test_names_of_classes_make_a_classifier(where: str, tmp_path: Path) -> None:
    tower = {**SMALL, "embed_dim": 768, "num_heads": 12, "num_classes": 512}
    make_timm_checkpoint(tmp_path, "vit_base_patch32_clip_224.openai", **tower)
    assert (inspect_model(str(tmp_path)).pooled, inspect_model(str(tmp_path)).num_labels) == ("projected_cls", 0)
    names = {"label_names": [f"kind {i}" for i in range(512)]}
    published = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    edit(tmp_path, **(names if where == "beside" else {"pretrained_cfg": {**published, **names}}))
    info = inspect_model(str(tmp_path))
    assert (info.pooled, info.num_labels, info.labels[511]) == ("mean_patch_tokens", 512, "kind 511")


def test_as_many_classes_as_another_tower_projects_to(tmp_path: Path) -> None:
    tower = {**SMALL, "embed_dim": 768, "num_heads": 12, "num_classes": 768}
    make_timm_checkpoint(tmp_path, "vit_base_patch32_clip_224.openai", **tower)
    assert inspect_model(str(tmp_path)).num_labels == 768


def test_towers_trained_with_quick_gelu_are_known() -> None:
    """By timm's notes on them, and by their tags alone."""
    for name, config in published_clip_towers().items():
        if "_quickgelu_" in name:
            continue
        noted = "natively QuickGELU" in str(config["pretrained_cfg"].pop("notes", ""))
        assert trained_with_quick_gelu(config) == noted, name


@pytest.mark.parametrize(
    ("architecture", "changed", "classes", "warned"),
    [
        ("vit_base_patch32_clip_224.openai", {}, 512, True),
        ("vit_base_patch32_clip_224.openai", {"notes": None}, 512, True),
        ("vit_base_patch32_clip_224.openai", {"tag": "ours"}, 512, True),
        ("vit_base_patch32_clip_224.openai", {"tag": "ours", "notes": None}, 512, False),
        ("vit_base_patch32_clip_224.openai", {}, 37, False),
        ("vit_base_patch32_clip_224.laion2b", {}, 512, False),
        ("vit_base_patch32_clip_quickgelu_224.openai", {}, 512, False),
    ],
)
def test_another_gelu_than_it_was_trained_with_is_told(
    architecture: str, changed: dict[str, Any], classes: int, warned: bool, tmp_path: Path, caplog: Any
) -> None:
    make_timm_checkpoint(tmp_path, architecture, **{**SMALL, "num_classes": classes})
    published = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    edit(tmp_path, pretrained_cfg={**published, **changed})
    inspect_model(str(tmp_path))
    assert (f"{tmp_path}: trained with QuickGELU, but runs with the exact GELU" in caplog.text) == warned
    caplog.clear()
    edit(tmp_path, model_args={"act_layer": "quick_gelu", "num_heads": 4})
    assert inspect_model(str(tmp_path)).network.activation == "quick_gelu"
    assert not caplog.records

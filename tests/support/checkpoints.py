"""Checkpoints with random weights, written by the reference libraries, and what those libraries compute with them.

    folder = make_checkpoint(tmp_path / "vit", "vit-classifier")
    expected = reference_outputs(folder, photos(8))

Weights are spread out, not freshly initialised: norms, biases, LayerScale and position tables all matter, so that a
forgotten one shows. Small by default; `size="base"` gives the published base size.
"""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def _define_torchvision_operators() -> None:
    """torchvision built for CUDA loads beside a CPU build of torch once these operators have a declaration."""
    try:
        importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return
    if not hasattr(torch.ops.torchvision, "nms"):
        for name in ("nms", "qnms"):
            _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
_define_torchvision_operators()

import transformers  # noqa: E402  (needs the operators)

SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 192},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}


_NONE: Mapping[str, Any] = MappingProxyType({})


class Kind(NamedTuple):
    """A checkpoint class of transformers, its config, its image processor, and the class that users embed with."""

    saved: str
    config: str
    processor: str = "ViTImageProcessorPil"
    options: Mapping[str, Any] = _NONE
    processor_options: Mapping[str, Any] = _NONE
    embedded: str = ""


_EACH = {"use_relative_position_bias": True}
_SHARED = {"use_shared_relative_position_bias": True, "use_mask_token": True}
_BILINEAR = {"resample": 2}

KINDS: dict[str, Kind] = {
    "vit": Kind("ViTModel", "ViTConfig"),
    "vit-classifier": Kind("ViTForImageClassification", "ViTConfig", options={"num_labels": 37}),
    "vit-mim": Kind("ViTForMaskedImageModeling", "ViTConfig", embedded="ViTModel"),
    "beit": Kind("BeitModel", "BeitConfig", "BeitImageProcessorPil", _EACH, _BILINEAR),
    "beit-cls": Kind("BeitModel", "BeitConfig", "BeitImageProcessorPil", {**_EACH, "use_mean_pooling": False}),
    "beit-absolute": Kind(
        "BeitModel",
        "BeitConfig",
        "BeitImageProcessorPil",
        {"use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0},
    ),
    "beit-classifier": Kind(
        "BeitForImageClassification", "BeitConfig", "BeitImageProcessorPil", {**_EACH, "num_labels": 37}, _BILINEAR
    ),
    "beit-mim": Kind(
        "BeitForMaskedImageModeling", "BeitConfig", "BeitImageProcessorPil", _SHARED, _BILINEAR, embedded="BeitModel"
    ),
}


_SMALL_DECODER = {
    "decoder_num_hidden_layers": 1,
    "decoder_hidden_size": 16,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}
_CLIP = "CLIPImageProcessorPil"

OTHER_KINDS: dict[str, Kind] = {
    "deit": Kind("DeiTModel", "DeiTConfig", "DeiTImageProcessorPil"),
    "deit-classifier": Kind("DeiTForImageClassification", "DeiTConfig", "DeiTImageProcessorPil", {"num_labels": 37}),
    "deit-distilled": Kind(
        "DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        "DeiTImageProcessorPil",
        {"num_labels": 37},
        embedded="DeiTModel",
    ),
    "dinov2": Kind("Dinov2Model", "Dinov2Config", "BitImageProcessorPil"),
    "dinov2-classifier": Kind(
        "Dinov2ForImageClassification", "Dinov2Config", "BitImageProcessorPil", {"num_labels": 37}
    ),
    "dinov2-registers": Kind(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", "BitImageProcessorPil", {"use_swiglu_ffn": True}
    ),
    "dinov2-registers-classifier": Kind(
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        "BitImageProcessorPil",
        {"num_labels": 37},
    ),
    "mae": Kind("ViTMAEForPreTraining", "ViTMAEConfig", options=_SMALL_DECODER, embedded="ViTMAEModel"),
    "msn": Kind("ViTMSNModel", "ViTMSNConfig"),
    "msn-classifier": Kind("ViTMSNForImageClassification", "ViTMSNConfig", options={"num_labels": 37}),
    "clip": Kind("CLIPVisionModel", "CLIPVisionConfig", _CLIP, {"patch_size": 16}),
    "clip-projection": Kind(
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", _CLIP, {"patch_size": 16}, embedded="CLIPVisionModel"
    ),
    "siglip": Kind("SiglipVisionModel", "SiglipVisionConfig", "SiglipImageProcessorPil"),
    "data2vec": Kind("Data2VecVisionModel", "Data2VecVisionConfig", "BeitImageProcessorPil", _SHARED),
    "data2vec-classifier": Kind(
        "Data2VecVisionForImageClassification",
        "Data2VecVisionConfig",
        "BeitImageProcessorPil",
        {**_EACH, "num_labels": 37},
    ),
}


def make_checkpoint(
    folder: Path, kind: str, *, size: str = "small", seed: int = 0, safetensors: bool = True, **config: Any
) -> Path:
    """Write config, preprocessor and weights of `kind` (a key of KINDS) into `folder`; `config` goes on top."""
    row = (KINDS | OTHER_KINDS)[kind]
    options = {**SIZES[size], **row.options, **config}
    model = getattr(transformers, row.saved)(getattr(transformers, row.config)(**options))
    spread_out(model, seed)
    model.save_pretrained(folder)
    if not safetensors:
        torch.save(saved_tensors(folder), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    side = config.get("image_size", 224)
    processor = getattr(transformers, row.processor)
    size_options = {"size": {"height": side, "width": side}}
    if row.processor in ("BitImageProcessorPil", "CLIPImageProcessorPil", "DeiTImageProcessorPil"):
        size_options = {"crop_size": {"height": side, "width": side}}
    processor(**{**size_options, **row.processor_options}).save_pretrained(folder)
    return folder


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    """The state dict in `folder`, under the names it was saved with."""
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


@torch.no_grad()
def spread_out(model: torch.nn.Module, seed: int) -> None:
    """Random weights that give activations of order one and let every parameter matter."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float, mean: float = 0.0) -> None:
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))

    for name, tensor in model.named_parameters():
        last = name.rpartition(".")[2]
        if tensor.ndim == 0:  # a temperature
            continue
        if "lambda" in last or "layer_scale" in name or "gamma" in last:
            tensor.copy_(0.1 + 0.9 * torch.rand(tensor.shape, generator=generator))
        elif "relative_position_bias_table" in name:
            normal(tensor, 1.5)
        elif last.endswith("bias"):
            normal(tensor, 0.3)
        elif tensor.ndim == 1:
            normal(tensor, 0.3, mean=1.0)
        elif tensor.ndim == 3:
            normal(tensor, 0.5)
        elif any(part in name for part in ("q_proj", "k_proj", "query", "key", "qkv")):
            normal(tensor, 1.3 / tensor[0].numel() ** 0.5)
        else:
            normal(tensor, 1.0 / tensor[0].numel() ** 0.5)


def preprocessed(folder: Path, paths: Sequence[Path], **options: Any) -> tuple[Tensor, Tensor]:
    """The photos through the checkpoint's own image processor: uint8 (B, H, W, 3), and float32 (B, 3, H, W)."""
    config = json.loads((folder / "preprocessor_config.json").read_text())
    name = config["image_processor_type"].removesuffix("Fast").removesuffix("Pil")
    processor = getattr(transformers, f"{name}Pil").from_pretrained(folder)
    images = [Image.open(path).convert("RGB") for path in paths]
    whole = processor(images, return_tensors="pt", **options)["pixel_values"]
    raw = processor(images, return_tensors="np", **options, do_rescale=False, do_normalize=False)["pixel_values"]
    pixels = torch.from_numpy(np.ascontiguousarray(np.transpose(raw, (0, 2, 3, 1))).astype(np.uint8))
    return pixels, whole


def _without_pooler(saved: str) -> bool:
    """Checkpoints into which transformers would put a random pooler."""
    return saved.startswith(("ViTFor", "DeiTFor"))


class Expected(NamedTuple):
    """What the reference computes: float32, (B, D), (B, D') and (B, L) or None; tokens (B, T, D)."""

    cls: Tensor
    pooled: Tensor
    logits: Tensor | None
    tokens: Tensor


@torch.no_grad()
def reference_outputs(folder: Path, pixel_values: Tensor, *, interpolate: bool = False) -> Expected:
    """CLS, pooled and logits by transformers in float32, from normalised pixels (B, 3, H, W).

    `pooled` is the model's pooler output where the checkpoint has one, else the mean of the patch tokens.
    """
    config = json.loads((folder / "config.json").read_text())
    saved = config["architectures"][0]
    row = next(row for row in (KINDS | OTHER_KINDS).values() if row.saved == saved)
    body_class = getattr(transformers, row.embedded or saved.replace("ForImageClassification", "Model"))
    logits = None
    takes_option = saved.startswith(("ViT", "DeiT", "CLIP", "Siglip"))
    options: dict[str, Any] = {"interpolate_pos_encoding": True} if interpolate and takes_option else {}
    whole = getattr(transformers, saved).from_pretrained(folder).eval()
    if "ForImageClassification" in saved:
        logits = whole(pixel_values, **options).logits
    arguments: dict[str, Any] = {"add_pooling_layer": False} if _without_pooler(saved) else {}
    if saved == "Data2VecVisionForImageClassification":
        arguments = {"add_pooling_layer": True}
    if saved.startswith("ViTMAE"):
        arguments, patches = {"mask_ratio": 0.0}, pixel_values[0, 0].numel() // config["patch_size"] ** 2
        options["noise"] = torch.arange(patches).expand(len(pixel_values), -1) / patches  # keeps the patches in order
    output = body_class.from_pretrained(folder, **arguments).eval()(pixel_values, **options)
    tokens, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
    if saved == "CLIPVisionModelWithProjection":
        pooled = whole(pixel_values, **options).image_embeds
    if pooled is None or saved.startswith("Dinov2"):  # whose pooler output is the CLS token
        first = 2 if saved.startswith("DeiT") else 1 + config.get("num_register_tokens", 0)
        pooled = tokens[:, first:].mean(dim=1)
    return Expected(tokens[:, 0], pooled, logits, tokens)


def make_timm_checkpoint(
    folder: Path,
    architecture: str,
    *,
    seed: int = 0,
    safetensors: bool = True,
    published: Mapping[str, Any] = _NONE,
    **args: Any,
) -> Any:
    """Write timm's `architecture`, made with `args`, as timm pushes it to the hub; returns the model itself.

    `published` goes into its `pretrained_cfg`.
    """
    import timm
    from timm.models._hub import save_for_hf

    model = timm.create_model(architecture, pretrained=False, **args).eval()
    spread_out(model, seed)
    side = (model.stem if hasattr(model, "stem") else model.patch_embed).img_size[0]
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, side, side), **published}
    save_for_hf(model, str(folder), model_args=args, safe_serialization=safetensors)
    return model


def timm_preprocessed(model: Any, paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """The photos through timm's evaluation transform: uint8 (B, H, W, 3), and float32 (B, 3, H, W)."""
    from timm.data import create_transform, resolve_model_data_config

    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    resize, crop = transform.transforms[:2]
    images = [Image.open(path).convert("RGB") for path in paths]
    pixels = np.stack([np.asarray(crop(resize(image))) for image in images])
    return torch.from_numpy(pixels), torch.stack([transform(image) for image in images])


@torch.no_grad()
def timm_outputs(model: Any, pixel_values: Tensor) -> Expected:
    """CLS, pooled and logits by timm in float32.

    `pooled` is what timm hands to the head, or the mean of the patch tokens where that is a single token.
    """
    tokens = model.forward_features(pixel_values)
    pooled = model.forward_head(tokens, pre_logits=True)
    if model.global_pool == "token" and isinstance(model.fc_norm, torch.nn.Identity):
        pooled = tokens[:, model.num_prefix_tokens :].mean(dim=1)
    logits = model.forward_head(tokens) if model.num_classes else None
    return Expected(tokens[:, 0], pooled, logits, tokens)


def worst_cosine(ours: Tensor, theirs: Tensor) -> float:
    """The smallest cosine between corresponding rows."""
    return float(torch.nn.functional.cosine_similarity(ours.double(), theirs.double(), dim=1).min())


def worst_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the larger of 1 and the reference's largest absolute value."""
    return float((ours.double() - theirs.double()).abs().max() / max(1.0, float(theirs.abs().max())))

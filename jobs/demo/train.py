"""Trains the demo's toy ViT on drawn pictures and saves it in Hugging Face layout.

    python -m jobs.demo.train --out jobs/demo/model

Needs `transformers` (the `test` extra); nothing else in the package imports this file. On a CPU, the same seed, steps,
threads and library versions give the same weights. The held-out pictures are none of the training
pictures and go through a real JPEG, PNG or WebP file, as they do in the demo.
"""

import argparse
import io
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console
from sklearn.cluster import KMeans

from jobs.demo.draw import CLASSES, draw, drawn_file

IMAGE_PX = 64
HELD_OUT_SEEDS = (1, 2, 3)

console = Console()
_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]

Pixels = npt.NDArray[np.uint8]


def main() -> None:
    options = _options()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    started = time.monotonic()
    pixels = draw_data_set(options.pictures, options.seed, options.threads)
    console.print(f"{len(pixels):,} training pictures drawn in {time.monotonic() - started:.0f} s")
    model = train(pixels, options.steps, options.batch_size, options.learning_rate)
    save(model, options.out)
    console.print(f"saved to {options.out} after {time.monotonic() - started:.0f} s")
    for seed in HELD_OUT_SEEDS:
        labels = np.arange(options.held_out) % len(CLASSES)
        predicted, cls = predict(model, draw_held_out(options.held_out, seed, options.threads))
        console.print(
            f"held-out seed {seed}, {len(labels)} pictures: top-1 {(predicted == labels).mean():.4f}, "
            f"purity of {len(CLASSES)} k-means clusters of CLS {cluster_purity(cls, labels):.4f}"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jobs.demo.train", description="Train the demo's toy ViT.")
    parser.add_argument("--out", type=Path, required=True, help="folder for config, preprocessor and weights")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="the highest, after warm-up")
    parser.add_argument("--pictures", type=int, default=40_000, help="training pictures to draw")
    parser.add_argument("--held-out", type=int, default=1500, help="pictures for each held-out seed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the training pictures, their order and the weights")
    return parser.parse_args()


def _to_model_size(picture: Image.Image) -> Pixels:
    """uint8 (64, 64, 3), resized as `preprocessor_config.json` says: straight to the square, bilinear."""
    return np.asarray(picture.convert("RGB").resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BILINEAR))


def _training_picture(number: int, seed: int) -> Pixels:
    """Seeded by three numbers, where files are by two: whatever its seed, no file shows a training picture."""
    return _to_model_size(draw(number % len(CLASSES), np.random.default_rng([seed, number, 1])))


def _held_out_picture(number: int, seed: int) -> Pixels:
    _, data = drawn_file(number, seed)
    return _to_model_size(Image.open(io.BytesIO(data)))


def draw_data_set(count: int, seed: int, processes: int) -> Pixels:
    """uint8 (count, 64, 64, 3); the label of picture `i` is `i % len(CLASSES)`."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return np.stack(list(pool.map(partial(_training_picture, seed=seed), range(count), chunksize=100)))


def draw_held_out(count: int, seed: int, processes: int) -> Pixels:
    """As `draw_data_set`, but through the encoded files that the demo writes."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return np.stack(list(pool.map(partial(_held_out_picture, seed=seed), range(count), chunksize=100)))


def load_transformers() -> Any:
    """The library. A torchvision that was built for CUDA loads beside a CPU torch once its operators are declared."""
    if not hasattr(torch.ops.torchvision, "nms"):
        for name in ("nms", "qnms"):
            _OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    import transformers

    return transformers


def new_model() -> Any:
    """A `ViTForImageClassification` of 0.3 million parameters: small enough to live in the repository.

    Weights start wider than the usual 0.02, which suits models eight times as wide, and the positions start as sines
    and cosines of row and column; with the defaults, attention stays uniform for most of so short a training.
    """
    transformers = load_transformers()
    config = transformers.ViTConfig(
        image_size=IMAGE_PX,
        patch_size=8,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=192,
        initializer_range=0.08,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )
    model = transformers.ViTForImageClassification(config)
    with torch.no_grad():
        model.vit.embeddings.position_embeddings[0, 1:] = 0.5 * _grid_positions(IMAGE_PX // 8, config.hidden_size)
    return model


def _grid_positions(side: int, width: int) -> torch.Tensor:
    """Sines and cosines (side², width) of row and column: Vaswani et al. 2017, section 3.5, once for each axis."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    frequency = 50.0 ** -torch.linspace(0, 1, width // 4)
    angles = [axis.reshape(-1, 1) * frequency for axis in (row, column)]
    return torch.cat([function(angle) for angle in angles for function in (torch.sin, torch.cos)], dim=1)


def _normalised(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in -1 … 1: mean and standard deviation 0.5."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def _moved(pixels: torch.Tensor) -> torch.Tensor:
    """The batch (B, 3, S, S) mirrored half of the time and shifted by up to 4 pixels, the border repeated."""
    if torch.rand(()) < 0.5:
        pixels = pixels.flip(3)
    padded = torch.nn.functional.pad(pixels, (4, 4, 4, 4), mode="replicate")
    down, right = torch.randint(0, 9, (2,)).tolist()
    return padded[:, :, down : down + IMAGE_PX, right : right + IMAGE_PX]


def train(pixels: Pixels, steps: int, batch_size: int, learning_rate: float, model: Any = None) -> Any:
    """AdamW, linear warm-up, cosine decay to zero, label smoothing; returns the model in evaluation mode.

    The classifier learns from CLS and, half the loss, from the mean of the patch tokens: it learns faster so, and both
    features end up apart by class.
    """
    data, labels = torch.from_numpy(pixels), torch.arange(len(pixels)) % len(CLASSES)
    model = new_model() if model is None else model
    model.train()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=0.05)
    started, recent_loss, order = time.monotonic(), 0.0, torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        if len(order) < batch_size:
            order = torch.randperm(len(data))
        batch, order = order[:batch_size], order[batch_size:]
        tokens = model.vit(pixel_values=_moved(_normalised(data[batch]))).last_hidden_state
        from_cls, from_patches = model.classifier(tokens[:, 0]), model.classifier(tokens[:, 1:].mean(dim=1))
        loss = (loss_of(from_cls, labels[batch]) + loss_of(from_patches, labels[batch])) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent_loss += float(loss.detach())
        if step % 200 == 0:
            console.print(f"step {step}/{steps}: loss {recent_loss / 200:.4f}, {time.monotonic() - started:.0f} s")
            recent_loss = 0.0
    return model.eval()


@torch.inference_mode()
def predict(model: Any, pixels: Pixels) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Predicted class (N,) and CLS after the final norm (N, 96)."""
    predicted, features = [], []
    for start in range(0, len(pixels), 250):
        output = model.vit(pixel_values=_normalised(torch.from_numpy(pixels[start : start + 250])))
        cls = output.last_hidden_state[:, 0]
        predicted.append(model.classifier(cls).argmax(-1).numpy())
        features.append(cls.numpy())
    return np.concatenate(predicted), np.concatenate(features)


def cluster_purity(features: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float:
    """Share of pictures that belong to the commonest class of their k-means cluster, one cluster for each class."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    found = KMeans(len(CLASSES), n_init=10, random_state=0).fit_predict(unit)
    commonest = sum(int(np.bincount(labels[found == index]).max()) for index in np.unique(found))
    return commonest / len(labels)


def save(model: Any, folder: Path) -> None:
    """Writes config.json, model.safetensors and preprocessor_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": IMAGE_PX, "width": IMAGE_PX},
        "resample": int(Image.Resampling.BILINEAR),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    text = json.dumps(preprocessor, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""What every benchmark shares: the environment it ran in, medians, checkpoints of published sizes, JSON."""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Sizes as published: hidden, layers, heads, MLP.
SIZES = {
    "vit-tiny": (192, 12, 3, 768),
    "vit-small": (384, 12, 6, 1536),
    "vit-base": (768, 12, 12, 3072),
    "vit-large": (1024, 24, 16, 4096),
    "beit-base": (768, 12, 12, 3072),
    "beit-large": (1024, 24, 16, 4096),
}
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def environment() -> dict[str, Any]:
    """CPU, its flags that matter, threads, versions and commit."""
    cpu = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")), "?")
    words = set(cpu.split())
    return {
        "cpu": model,
        "flags": [flag for flag in _FLAGS if flag in words],
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "ray", "pyarrow", "pillow", "simplejpeg", "numpy")},
        "commit": current_commit(),
    }


def current_commit() -> str:
    """That of this file's repository; `unknown` without git or in a copy that is none."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def make_model(folder: Path, size: str) -> Path:
    """A checkpoint of a published size with random weights, in Hugging Face layout.

    A ViT has 1,000 labels; a BEiT has the head of its pre-training, and a position table shared by its blocks.
    """
    if (folder / "model.safetensors").exists():
        return folder
    import torch

    # Declares torchvision's operators first, where a torchvision for CUDA lies beside a CPU torch.
    from jobs.demo.train import load_transformers

    transformers = load_transformers()
    hidden, layers, heads, mlp = SIZES[size]
    sizes = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp,
    }  # fmt: skip
    torch.manual_seed(0)
    if size.startswith("vit"):
        processor = {"image_processor_type": "ViTImageProcessor"}
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=1000))
    else:
        processor = {"image_processor_type": "BeitImageProcessor", "do_center_crop": False}
        config = transformers.BeitConfig(**sizes, use_shared_relative_position_bias=True, use_mask_token=True)
        model = transformers.BeitForMaskedImageModeling(config)
    model.save_pretrained(folder)
    processor |= {
        "do_resize": True, "do_rescale": True, "do_normalize": True, "size": {"height": 224, "width": 224},
        "resample": 2, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def write(path: str | None, result: dict[str, Any]) -> None:
    """Print the result and, if `path` is given, write it as JSON."""
    text = json.dumps(result, indent=1)
    print(text)
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text + "\n")

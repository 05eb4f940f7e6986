"""Ray Data as its documentation shows it: read_images, then a class with processor and model in map_batches.

    python benchmarks/peers/ray_data.py [--all-cores] PHOTOS MODEL OUT

As it stands there, one actor computes, to which Ray gives one thread. With an actor for each core, half a CPU booked by
each so that reading goes on beside them, all cores compute.

Written after https://docs.ray.io/en/latest/data/working-with-images.html and its example of batch inference with a
Hugging Face vision transformer.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import ray

sys.path.insert(0, str(Path(__file__).parents[2]))
BATCH = 16


class Embedder:
    """Processor and model, made once for each actor."""

    def __init__(self, model: str) -> None:
        from jobs.demo.train import load_transformers

        transformers = load_transformers()
        self.processor = transformers.AutoImageProcessor.from_pretrained(model)
        self.model = transformers.ViTModel.from_pretrained(model, add_pooling_layer=False).eval()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        import torch
        from PIL import Image

        inputs = self.processor([Image.fromarray(image) for image in batch["image"]], return_tensors="pt")
        with torch.inference_mode():
            outputs = self.model(**inputs)
        return {"uri": batch["path"], "cls": outputs.last_hidden_state[:, 0].numpy()}


def main() -> None:
    *flags, photos, model, out = sys.argv[1:]
    actors: dict[str, Any] = {"concurrency": 1}
    if flags == ["--all-cores"]:
        actors = {"concurrency": os.cpu_count(), "num_cpus": 0.5}
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}})
    images = ray.data.read_images(photos, mode="RGB", include_paths=True)
    embedded = images.map_batches(Embedder, fn_constructor_args=(model,), batch_size=BATCH, **actors)
    embedded.write_parquet(out)


if __name__ == "__main__":
    main()

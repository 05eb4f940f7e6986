"""A plain loop with transformers: open, processor, model, batch by batch.

    python benchmarks/peers/transformers_loop.py PHOTOS MODEL OUT [--dtype bfloat16]

Written after https://huggingface.co/docs/transformers/model_doc/vit.
"""

import argparse
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
from jobs.demo.train import load_transformers

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    transformers = load_transformers()
    dtype = getattr(torch, options.dtype)
    processor = transformers.AutoImageProcessor.from_pretrained(options.model)
    model = transformers.ViTModel.from_pretrained(options.model, dtype=dtype, add_pooling_layer=False).eval()
    files = sorted(options.photos.iterdir())
    features = []
    with torch.inference_mode():
        for start in range(0, len(files), BATCH):
            images = [Image.open(file).convert("RGB") for file in files[start : start + BATCH]]
            pixel_values = processor(images, return_tensors="pt")["pixel_values"].to(dtype)
            features += model(pixel_values).last_hidden_state[:, 0].float().tolist()
    pq.write_table(pa.table({"uri": [str(file) for file in files], "cls": features}), options.out)


if __name__ == "__main__":
    main()

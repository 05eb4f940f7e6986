"""Daft with a class function that holds the model: the way its documentation shows for batch inference.

    python benchmarks/peers/daft_class.py PHOTOS MODEL OUT

Written after https://docs.daft.ai/en/stable/custom-code/.
"""

import sys
from pathlib import Path

import daft
from daft import DataType, Series, col
from daft.functions import decode_image, download

sys.path.insert(0, str(Path(__file__).parents[2]))
from jobs.demo.train import load_transformers

# In the main thread: instances are made in several at once, and one would see the module half imported.
transformers = load_transformers()
BATCH = 16
WIDTH = 768


@daft.cls
class Embedder:
    """Processor and model, made once for each instance."""

    def __init__(self, model: str) -> None:
        self.processor = transformers.AutoImageProcessor.from_pretrained(model)
        self.model = transformers.ViTModel.from_pretrained(model, add_pooling_layer=False).eval()

    @daft.method.batch(return_dtype=DataType.list(DataType.float32()), batch_size=BATCH)
    def embed(self, images: Series) -> list[list[float]]:
        import torch
        from PIL import Image

        pictures = [Image.fromarray(image) for image in images.to_pylist()]
        inputs = self.processor(pictures, return_tensors="pt")
        with torch.inference_mode():
            return self.model(**inputs).last_hidden_state[:, 0].tolist()


def main() -> None:
    photos, model, out = sys.argv[1:4]
    embedder = Embedder(model)
    frame = daft.from_pydict({"uri": sorted(str(file) for file in Path(photos).iterdir())})
    frame = frame.with_column("image", decode_image(download(col("uri")), mode="RGB"))
    frame.select(col("uri"), embedder.embed(col("image")).alias("cls")).write_parquet(out)


if __name__ == "__main__":
    main()

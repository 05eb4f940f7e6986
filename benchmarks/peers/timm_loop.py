"""A loop with timm and a torch DataLoader, the same weights under timm's names.

    python benchmarks/peers/timm_loop.py PHOTOS MODEL OUT

Written after https://huggingface.co/docs/timm/feature_extraction.
"""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
BATCH = 16
NAMES = {"patch.": "patch_embed.proj.", "positions": "pos_embed", ".qkv.": ".attn.qkv.", ".out.": ".attn.proj.",
         ".fc1.": ".mlp.fc1.", ".fc2.": ".mlp.fc2."}  # fmt: skip


class Photos(torch.utils.data.Dataset):
    """Pictures through timm's evaluation transform."""

    def __init__(self, files: list[Path], transform: object) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.files[index]).convert("RGB"))


def timm_weights(model: str) -> dict[str, torch.Tensor]:
    """The checkpoint's trunk under timm's names."""
    from pipeline.models import inspect_model
    from pipeline.models.remap import remap
    from pipeline.models.weights import find_weights, read_tensors

    tensors = remap(read_tensors(find_weights(Path(model))), inspect_model(model).plan)
    renamed = {}
    for name, tensor in tensors.items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return {name: tensor for name, tensor in renamed.items() if not name.startswith("head")}


def main() -> None:
    photos, model, out = sys.argv[1:4]
    from jobs.demo.train import load_transformers

    load_transformers()  # declares torchvision's operators, where a torchvision for CUDA lies beside a CPU torch
    import timm
    from timm.data import create_transform

    network = timm.create_model("vit_base_patch16_224", num_classes=0, norm_layer=None).eval()
    network.load_state_dict(timm_weights(model))
    transform = create_transform((3, 224, 224), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3,
                                 crop_pct=1.0, crop_mode="squash")  # fmt: skip
    files = sorted(Path(photos).iterdir())
    loader = torch.utils.data.DataLoader(Photos(files, transform), batch_size=BATCH, num_workers=1)
    features: list[list[float]] = []
    with torch.inference_mode():
        for batch in loader:
            features += network.forward_features(batch)[:, 0].tolist()
    pq.write_table(pa.table({"uri": [str(file) for file in files], "cls": features}), out)


if __name__ == "__main__":
    main()

"""The whole model: a trunk (ViT, BEiT or Mixer) and what is read out of it."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from pipeline.models.architecture import Architecture
from pipeline.models.beit import Beit
from pipeline.models.mixer import Mixer
from pipeline.models.outputs import Outputs
from pipeline.models.readout import Readout
from pipeline.models.vit import ViT

# Outputs that hold something for each patch.
TOKEN_OUTPUTS = frozenset({"patches", "visual_tokens"})
TRUNKS: dict[str, type[ViT] | type[Beit] | type[Mixer]] = {"vit": ViT, "beit": Beit, "mixer": Mixer}


class VisionModel(nn.Module):
    """uint8 pixels (B, H, W, 3) of exactly `image_size` → Outputs.

    The trunk runs in the precision it was loaded in; the final norm and everything behind it run in float32.
    """

    def __init__(self, a: Architecture, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.architecture = a
        self.image_size = image_size
        self.trunk: ViT | Beit | Mixer = TRUNKS[a.network](a, a.grid(image_size))
        self.readout = Readout(a)

    @torch.inference_mode()
    def forward(self, pixels: Tensor, also: Collection[str] = ()) -> Outputs:
        """`also` names outputs that are made only on request: `patches`, `visual_tokens`; others are ignored."""
        whole = not TOKEN_OUTPUTS.isdisjoint(also)
        return self.readout(self.trunk(pixels, whole), also)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def last_hidden_state(self, pixels: Tensor) -> Tensor:
        """All tokens behind the final norm: float32 (B, T, D), prefix tokens first."""
        return self.trunk(pixels)  # type: ignore[no-any-return]

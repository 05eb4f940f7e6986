"""How a checkpoint wants its pixels. Read from the checkpoint, recorded in the run, never assumed."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Preprocessing(BaseModel):
    """Resize, optional centre crop, then `(pixel * rescale_factor - mean) / std`, in this order.

    At most one of these is set: `resize` (height, width); `shortest_edge` (pixels, aspect ratio kept); `cover` (height,
    width: aspect ratio kept, just large enough to cover this); none where the checkpoint does not resize at all.
    `resample` is Pillow's filter number: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming. `crop` (height,
    width) is a centre crop; the result is always `height × width`. `crop_rounding`: of an odd margin of 2m + 1
    pixels, m are in front (`down`, Hugging Face), or the even one of m and m + 1 (`even`, torchvision and so timm).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    resize: tuple[int, int] | None = None
    shortest_edge: int | None = None
    cover: tuple[int, int] | None = None
    resample: Literal[0, 1, 2, 3, 4, 5] = 2
    crop: tuple[int, int] | None = None
    crop_rounding: Literal["down", "even"] = "down"
    rescale_factor: float = Field(default=1 / 255, gt=0)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of what the model receives. Raises ValueError where no size is fixed."""
        size = self.crop or self.resize
        if size is None:
            raise ValueError("preprocessing gives no fixed size: neither crop nor resize is set")
        return size

"""What one forward pass costs."""

from pipeline.models.architecture import Architecture, head_input_width, stem_shapes


def forward_flop(a: Architecture, image_size: tuple[int, int], *, prefix_only: bool = False) -> float:
    """Floating-point operations for one image of (height, width) pixels: two for each multiplication of the patch
    embedding, the blocks, the pooling and the classifier. As torch's FlopCounterMode counts them; visual tokens, which
    are computed only on request, are left out. `prefix_only`: the last block as in `prefix.py`."""
    rows, columns = a.grid(image_size)
    patches = rows * columns
    tokens = patches + a.prefix_tokens
    mixing = 4 * tokens * a.width**2 + 2 * tokens**2 * a.width
    if a.network == "mixer":
        mixing = 2 * tokens * a.width * a.token_mlp_width
    mlp = (3 if a.swiglu else 2) * tokens * a.width * a.mlp_width
    spared = 0
    if prefix_only:
        unread = tokens - a.prefix_tokens
        spared = 2 * unread * a.width**2 + 2 * unread * tokens * a.width + mlp // tokens * unread
    if a.stem is None:
        embedding = patches * a.patch_size[0] * a.patch_size[1] * 3 * a.width
    else:
        pixels = image_size[0] * image_size[1]
        embedding = pixels // a.stem.stride**2 * a.stem.channels * a.width + _stem_multiplications(a, pixels)
    return 2.0 * (a.depth * (mixing + mlp) - spared + embedding + _readout_multiplications(a, patches))


def _readout_multiplications(a: Architecture, patches: int) -> int:
    d = a.width
    total = 0
    if a.pooled in ("pooler", "projected_cls"):
        total += d * a.feature_width if a.pooled == "pooler" or a.projection_width else 0
    if a.pooled == "attention_pool":
        total += 2 * d**2 + 2 * patches * d**2 + 2 * patches * d + 2 * d * a.mlp_width
    if a.head_input != "none":
        total += a.num_labels * head_input_width(a)
    if a.head_input == "cls_and_distillation":
        total += a.num_labels * d
    return total


def _stem_multiplications(a: Architecture, pixels: int) -> int:
    """Of a hybrid's ResNet: each weight of a convolution is used once for each of its output's places.

    The root works at half the resolution; a stage at a quarter, and each further one at half of the one before. Its
    first convolution still sees the places of the stage before.
    """
    total = 0
    assert a.stem is not None
    for name, shape in stem_shapes(a.stem).items():
        if len(shape) != 4:
            continue
        stride = 2
        if name.startswith("stem.stages."):
            stage, unit, module = name.split(".")[2:5]
            stride = 4 * 2 ** int(stage)
            if int(stage) and unit == "0" and module == "conv1":
                stride //= 2
        total += shape[0] * shape[1] * shape[2] * shape[3] * (pixels // stride**2)
    return total

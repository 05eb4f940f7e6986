"""timm's hybrids with Google's weights: a ViT on a ResNet's features (R+Ti/16, R26+S/32, R50+B/16, R50+L/32)."""

import re

from pipeline.models.architecture import Architecture, Stem
from pipeline.models.formats import timm, timm_vit
from pipeline.models.formats.format import Config, Format, Shapes, Spelling

BACKBONE = "patch_embed.backbone."
UNIT = re.compile(r"patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\.")


def root(shapes: Shapes) -> str:
    """Where the root convolution is: R+Ti/16 has nothing but it."""
    return f"{BACKBONE}stem." if f"{BACKBONE}stem.conv.weight" in shapes else BACKBONE


def architecture(config: Config, shapes: Shapes) -> Architecture:
    """The stem from the names of its units, the rest as in a ViT without one."""
    units: dict[int, int] = {}
    for name in shapes:
        if found := UNIT.match(name):
            units[int(found[1])] = max(units.get(int(found[1]), 0), int(found[2]) + 1)
    stages = tuple(units.get(stage, 0) for stage in range(max(units, default=-1) + 1))
    return timm_vit.architecture(config, shapes, Stem(shapes[f"{root(shapes)}conv.weight"][0], stages))


def spell(a: Architecture, shapes: Shapes) -> Spelling:
    """The ViT's spelling, and the stem's."""
    assert a.stem is not None
    spelling = {"stem.root": f"{root(shapes)}conv", "stem.root_norm": f"{root(shapes)}norm"}
    for stage, count in enumerate(a.stem.units):
        for unit in range(count):
            ours, theirs = f"stem.stages.{stage}.{unit}.", f"{BACKBONE}stages.{stage}.blocks.{unit}."
            for kind in ("conv", "norm"):
                spelling |= {f"{ours}{kind}{each}": f"{theirs}{kind}{each}" for each in (1, 2, 3)}
                spelling[f"{ours}{kind}_proj"] = f"{theirs}downsample.{kind}"
    return {**timm_vit.spell(a, shapes), **spelling}


def recognise(config: Config, shapes: Shapes) -> str:
    """timm's name of a ViT, and a 7×7 root convolution; its other hybrids have ResNets of another kind."""
    shape = shapes.get(f"{root(shapes)}conv.weight", ())
    return by_name(config, shapes) if shape[1:] == (3, 7, 7) else ""


by_name = timm.by_architecture(r"vit_", "patch_embed.proj.weight")

FORMAT = Format(
    family="hybrid vit",
    layout="timm",
    examples="timm/vit_small_r26_s32_224.augreg_in21k, timm/vit_base_r50_s16_384.orig_in21k_ft_in1k",
    test="tests/models/test_models_timm.py",
    recognise=recognise,
    architecture=architecture,
    spell=spell,
    ignored=timm_vit.FORMAT.ignored,
)

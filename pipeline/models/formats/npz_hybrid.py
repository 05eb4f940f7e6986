"""google-research's `.npz` of hybrids: a ViT on a ResNet's features (R+Ti/16, R26+S/32, R50+B/16, R50+L/32).

The transformer is spelled as in `npz_vit.py`; before it stand `conv_root`, `gn_root` and `block{stage}/unit{unit}/…`,
counted from 1. R+Ti/16 is the root alone, with patches of 8×8 features.
"""

import re

from pipeline.models.architecture import Architecture, Stem
from pipeline.models.formats import npz_vit
from pipeline.models.formats.format import Config, Format, Shapes, Spelling

UNIT = re.compile(r"block(\d+)/unit(\d+)/")


def architecture(config: Config, shapes: Shapes) -> Architecture:
    """The stem from the names of its units, the rest as in a ViT without one."""
    units: dict[int, int] = {}
    for name in shapes:
        if found := UNIT.match(name):
            units[int(found[1])] = max(units.get(int(found[1]), 0), int(found[2]))
    stages = tuple(units.get(stage, 0) for stage in range(1, max(units, default=0) + 1))
    return npz_vit.architecture(config, shapes, Stem(shapes["conv_root/kernel"][0], stages))


def spell(a: Architecture, shapes: Shapes) -> Spelling:
    """The transformer's spelling, and the stem's."""
    assert a.stem is not None
    modules, norms = {"stem.root": "conv_root"}, {"stem.root_norm": "gn_root"}
    for stage, count in enumerate(a.stem.units):
        for unit in range(count):
            ours, theirs = f"stem.stages.{stage}.{unit}.", f"block{stage + 1}/unit{unit + 1}/"
            for which in ("1", "2", "3", "_proj"):
                modules[f"{ours}conv{which}"] = f"{theirs}conv{which}"
                norms[f"{ours}norm{which}"] = f"{theirs}gn{which}"
    return {**npz_vit.spell(a, shapes), **npz_vit.in_flax(modules, norms)}


def recognise(config: Config, shapes: Shapes) -> str:
    """An `.npz` with a ResNet's root convolution and a ViT's patch embedding."""
    if "raw_shapes" not in config or not {"conv_root/kernel", "embedding/kernel"} <= shapes.keys():
        return ""
    return "it is an .npz with conv_root/kernel and embedding/kernel"


FORMAT = Format(
    family="hybrid vit",
    layout="google-research .npz",
    examples="gs://vit_models/augreg/R26_S_32-i21k-300ep-….npz, gs://vit_models/imagenet21k/R50+ViT-B_16.npz",
    test="tests/models/test_models_hybrid.py",
    recognise=recognise,
    architecture=architecture,
    spell=spell,
    ignored=npz_vit.FORMAT.ignored,
)

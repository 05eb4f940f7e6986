"""Own ViT and BEiT networks: which checkpoint it is, how it wants its pixels, and one forward pass for everything.

Importing this package imports neither torch nor numpy; `load_model` does when it is called.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.models.inspect import ModelInfo, inspect_model, require_classes
    from pipeline.models.load import load_model
    from pipeline.models.network import VisionModel
    from pipeline.models.outputs import Outputs
    from pipeline.models.own_head import with_head
    from pipeline.models.precision import choose_dtype, describe_hardware
    from pipeline.models.preprocessing import read_preprocessing
    from pipeline.models.zero_shot import inspect_text, load_text, with_labels

__all__ = [
    "ModelInfo",
    "Outputs",
    "VisionModel",
    "choose_dtype",
    "describe_hardware",
    "inspect_model",
    "inspect_text",
    "load_model",
    "load_text",
    "read_preprocessing",
    "require_classes",
    "with_head",
    "with_labels",
]

_MODULES = {
    "ModelInfo": "inspect",
    "Outputs": "outputs",
    "VisionModel": "network",
    "choose_dtype": "precision",
    "describe_hardware": "precision",
    "inspect_model": "inspect",
    "inspect_text": "zero_shot",
    "load_model": "load",
    "load_text": "zero_shot",
    "read_preprocessing": "preprocessing",
    "require_classes": "inspect",
    "with_head": "own_head",
    "with_labels": "zero_shot",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

"""Own ViT and BEiT networks: which checkpoint it is, how it wants its pixels, and one forward pass for everything.

Importing this package imports neither torch nor numpy; `load_model` does when it is called.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.models.inspect import ModelInfo, inspect_model
    from pipeline.models.load import load_model
    from pipeline.models.network import VisionModel
    from pipeline.models.outputs import Outputs
    from pipeline.models.precision import choose_dtype, describe_hardware
    from pipeline.models.preprocessing import read_preprocessing

__all__ = [
    "ModelInfo",
    "Outputs",
    "VisionModel",
    "choose_dtype",
    "describe_hardware",
    "inspect_model",
    "load_model",
    "read_preprocessing",
]

_MODULES = {
    "ModelInfo": "inspect",
    "Outputs": "outputs",
    "VisionModel": "network",
    "choose_dtype": "precision",
    "describe_hardware": "precision",
    "inspect_model": "inspect",
    "load_model": "load",
    "read_preprocessing": "preprocessing",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

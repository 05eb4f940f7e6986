"""A network as ONNX: uint8 pixels in, normalisation inside, any batch size, checked before it counts."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.models import ModelInfo, VisionModel, load_model
from schemas.errors import CheckpointError, SpecError

# LayerNormalization is one operator since 17; TensorRT 10 and ONNX Runtime 1.14 and later read 18.
OPSET = 18
# Of the larger of 1 and the network's own largest absolute value: float32 sums in another order.
TOLERANCE = 1e-4
_CHECKED_BATCHES = (1, 3)


class _Traced(nn.Module):
    """`VisionModel` with the outputs as a tuple, and the prefix tokens spread over the batch where it is traced.

    The network spreads them itself by the length of the batch, which a trace would keep as a constant.
    """

    def __init__(self, model: VisionModel, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.prefix: Tensor = cast(Tensor, model.trunk.prefix)
        del model.trunk.prefix

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        trunk: Any = self.model.trunk
        trunk.prefix = self.prefix.expand(pixels.shape[0], -1, -1)
        outputs = self.model.readout(trunk(pixels))
        return tuple(getattr(outputs, name) for name in self.names)


def export_onnx(info: ModelInfo, path: Path) -> None:
    """Write `info`'s network to `path`: input `pixels` (batch, H, W, 3) uint8; outputs `cls`, `pooled`, `logits`.

    Raises CheckpointError where ONNX Runtime does not give what the network gives, within TOLERANCE, and SpecError
    where there is no ONNX Runtime to ask.
    """
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise SpecError(
            f"writing ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}, or give --no-onnx"
        )
    names = [name for name in ("cls", "pooled", "logits") if _has(info, name)]
    example = torch.zeros(1, *info.image_size, 3, dtype=torch.uint8)
    # The packed layout that a CPU computes in is made of operators that ONNX does not have.
    traced = _Traced(load_model(info, packed=False), names).eval()
    with torch.no_grad(), warnings.catch_warnings():
        # The exporter that needs no further package; it warns that another one is the default, and about constants
        # of the shape, which are meant: only the batch is dynamic.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        torch.onnx.export(
            traced,
            (example,),
            str(path),
            input_names=["pixels"],
            output_names=names,
            dynamic_axes={name: {0: "batch"} for name in ("pixels", *names)},
            opset_version=OPSET,
            dynamo=False,
        )
    check_onnx(info, path, names)


def check_onnx(info: ModelInfo, path: Path, names: list[str]) -> None:
    """Compare the file with the network on random pixels, for two batch sizes.

    Raises CheckpointError for another opset, an operator outside ONNX's own set, or an output that is off.
    """
    import onnx
    import onnxruntime  # type: ignore[import-untyped]

    graph = onnx.load(str(path), load_external_data=False)
    opsets = {item.domain: item.version for item in graph.opset_import}
    if opsets != {"": OPSET}:
        raise CheckpointError(f"{info.name}: exported with opsets {opsets}, expected ONNX {OPSET} alone")
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    model = load_model(info)
    generator = np.random.default_rng(0)
    for count in _CHECKED_BATCHES:
        pixels = generator.integers(0, 256, (count, *info.image_size, 3), dtype=np.uint8)
        expected = model(torch.from_numpy(pixels))
        for name, got in zip(names, session.run(names, {"pixels": pixels}), strict=True):
            wanted = getattr(expected, name).numpy()
            off = float(np.abs(got - wanted).max()) / max(1.0, float(np.abs(wanted).max()))
            if not off <= TOLERANCE:
                raise CheckpointError(f"{info.name}: ONNX output {name} is off by {off:.2g}, more than {TOLERANCE:g}")


def _has(info: ModelInfo, name: str) -> bool:
    return {"cls": info.has_cls, "pooled": True, "logits": bool(info.num_labels)}[name]

"""A Triton model repository from a checkpoint: our own module behind the Python back end, and the same as ONNX.

    REPO/NAME/config.pbtxt                the Python back end
    REPO/NAME/1/model.py                  torch_triton_model.py
    REPO/NAME/1/checkpoint/               config and weights, as they were found, and nothing that lay beside them
    REPO/NAME/1/package/                  our modules, which read and run them: the server needs no install of ours
    REPO/NAME-onnx/config.pbtxt           ONNX Runtime; TensorRT builds its plan from the same file
    REPO/NAME-onnx/1/model.onnx

Format of config.pbtxt: `model_config.proto` of Triton's common repository, in protobuf's text format.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pipeline
import schemas
from pipeline import storage
from pipeline.addresses import join
from pipeline.models import ModelInfo
from pipeline.models.hub import SMALL_FILES
from pipeline.models.weights import Weights, find_weights
from pipeline.predictors.triton_protocol import INPUT_NAME, default_model_name, identity
from schemas.errors import OutputError, SpecError

ONNX_SUFFIX = "-onnx"
CHECKPOINT = "checkpoint"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
DTYPES = ("float32", "bfloat16", "float16")
QUEUE_DELAY_US = 2000
_SKIPPED = shutil.ignore_patterns("__pycache__", "*.pyc")


class Serving(NamedTuple):
    """How the server runs a model. `dtype` is float32, bfloat16 or float16; `gpu` places the instances."""

    dtype: str = "float32"
    max_batch_size: int = 64
    instances: int = 1
    gpu: bool = False


def check_serving(serving: Serving) -> Serving:
    """`serving` itself. Raises SpecError for a precision that does not exist, or not on that device."""
    if serving.dtype not in DTYPES:
        raise SpecError(f"--dtype {serving.dtype}: a server runs {', '.join(DTYPES)}; choose one")
    if serving.dtype == "float16" and not serving.gpu:
        raise SpecError("--dtype float16 runs on GPUs only; add --gpu, or use float32 or bfloat16")
    return serving


def export_triton(
    info: ModelInfo,
    out: str,
    serving: Serving,
    *,
    name: str | None = None,
    onnx: bool = True,
    storage_options: Mapping[str, Any] = {},
) -> list[str]:
    """Write the repository to `out`, a folder or an object-store prefix; returns the names of the models in it.

    Raises SpecError for a name that is no folder's, OutputError if a model of that name is there already, and
    CheckpointError if the exported ONNX does not give what the network gives.
    """
    name = name or default_model_name(info)
    if not NAME.fullmatch(name):
        raise SpecError(f"--name {name}: a model's name is letters, digits, `_`, `-` and `.`")
    fs, root = storage.filesystem(out, storage_options)
    names = [name, f"{name}{ONNX_SUFFIX}"] if onnx else [name]
    for one in names:
        if storage.exists(fs, join(root, one)):
            raise OutputError(f"{out}: a model {one} is there already; remove it, or choose another --name")
    with tempfile.TemporaryDirectory(prefix="patchstream-triton-") as folder:
        write_python_model(info, Path(folder) / name, serving)
        if onnx:
            write_onnx_model(info, Path(folder) / f"{name}{ONNX_SUFFIX}", serving)
        fs.makedirs(root, exist_ok=True)
        for one in names:
            fs.put(str(Path(folder) / one), join(root, one), recursive=True)
    return names


def write_python_model(info: ModelInfo, folder: Path, serving: Serving) -> None:
    """The model that runs our own module."""
    version = folder / "1"
    version.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("torch_triton_model.py"), version / "model.py")
    weights = find_weights(Path(info.folder))
    (version / CHECKPOINT).mkdir()
    beside = (*((weights.index_file,) if weights.index_file else ()), *(weights.folder / name for name in SMALL_FILES))
    for path in (*weights.files, *(path for path in beside if path.is_file())):
        shutil.copy(path, version / CHECKPOINT)
    package = version / "package"
    # Whole, a megabyte, so that there is no list to fall behind what the modules import.
    for source in (schemas, pipeline):
        shutil.copytree(Path(str(source.__file__)).parent, package / source.__name__, ignore=_SKIPPED)
    (folder / "config.pbtxt").write_text(config_text(info, folder.name, serving, backend="python"))


def write_onnx_model(info: ModelInfo, folder: Path, serving: Serving) -> None:
    """The same network as ONNX, compared with the original before it counts as written."""
    from pipeline.predictors.torch_onnx import export_onnx

    (folder / "1").mkdir(parents=True)
    export_onnx(info, folder / "1/model.onnx")
    text = config_text(info, folder.name, serving._replace(dtype="float32"), backend="onnxruntime")
    (folder / "config.pbtxt").write_text(text)


def config_text(info: ModelInfo, name: str, serving: Serving, *, backend: str) -> str:
    """config.pbtxt. What identifies the computation stands in `parameters`, where a client reads it back."""
    height, width = info.image_size
    dims = f"[{height}, {width}, 3]"
    outputs = ",\n".join(
        f"  {{ name: {json.dumps(output)}, data_type: TYPE_FP32, dims: [{size}] }}"
        for output, size in output_sizes(info).items()
    )
    extra = {}
    if backend == "python":
        # It takes its input from host memory and moves it to the device itself, in one piece.
        extra = {"FORCE_CPU_ONLY_INPUT_TENSORS": "yes", CHECKPOINT: _copied(find_weights(Path(info.folder)))}
    parameters = "\n".join(
        f"parameters {{ key: {json.dumps(key)}, value {{ string_value: {json.dumps(value)} }} }}"
        for key, value in {**identity(info), "dtype": serving.dtype, **extra}.items()
    )
    warm_ups = "\n".join(
        f'model_warmup {{ name: "batch_{size}", batch_size: {size}, inputs {{ key: "{INPUT_NAME}", '
        f"value {{ data_type: TYPE_UINT8, dims: {dims}, zero_data: true }} }} }}"
        for size in sorted({1, serving.max_batch_size})
    )
    return f"""name: {json.dumps(name)}
backend: "{backend}"
max_batch_size: {serving.max_batch_size}
input [
  {{ name: "{INPUT_NAME}", data_type: TYPE_UINT8, dims: {dims} }}
]
output [
{outputs}
]
dynamic_batching {{
  preferred_batch_size: [{serving.max_batch_size}]
  max_queue_delay_microseconds: {QUEUE_DELAY_US}
}}
instance_group [ {{ count: {serving.instances}, kind: {"KIND_GPU" if serving.gpu else "KIND_CPU"} }} ]
version_policy {{ latest {{ num_versions: 1 }} }}
{parameters}
{warm_ups}
"""


def _copied(weights: Weights) -> str:
    """What `model.py` inspects: the file, for one alone may have any name, or the folder of several."""
    return CHECKPOINT if weights.index_file else f"{CHECKPOINT}/{weights.files[0].name}"


def output_sizes(info: ModelInfo) -> dict[str, int]:
    """Outputs of a served model and their widths: what the checkpoint has of cls, pooled and logits."""
    sizes = {"cls": info.hidden_size} if info.has_cls else {}
    sizes["pooled"] = info.pooled_size
    return {**sizes, "logits": info.num_labels} if info.num_labels else sizes

"""`export-triton`: a checkpoint as a model repository for a Triton server."""

from collections.abc import Callable
from typing import Annotated, Any

import typer

from jobs.options import AsForEmbed, AsJson, FinalNorm, Options, Revision, parse_options
from jobs.output import emit


def export_triton(
    model: Annotated[str, typer.Argument(help="A folder, an object-store prefix or a hub name.", metavar="MODEL")],
    out: Annotated[str, typer.Option(help="The model repository: a folder or an object-store prefix.")],
    name: Annotated[str | None, typer.Option(help="Name on the server (default: the checkpoint's own).")] = None,
    dtype: Annotated[
        str, typer.Option(help="Precision of the Python back end: float32, bfloat16 or float16 (GPU only).")
    ] = "float32",
    max_batch: Annotated[int, typer.Option(min=1, max=4096, help="Largest batch that the server makes.")] = 64,
    instances: Annotated[int, typer.Option(min=1, help="Copies of the model on each device.")] = 1,
    gpu: Annotated[bool, typer.Option("--gpu", help="Place the copies on the server's GPUs.")] = False,
    onnx: Annotated[bool, typer.Option(help="Also write NAME-onnx, for ONNX Runtime and TensorRT.")] = True,
    image_size: AsForEmbed = None,
    revision: Revision = None,
    beit_final_norm: FinalNorm = False,
    storage_options: Options = None,
    as_json: AsJson = False,
) -> int:
    """Write a Triton model repository: our own module for the Python back end, and the same network as ONNX."""
    import json

    from pipeline.models import inspect_model
    from pipeline.predictors.triton_repository import Serving, check_serving
    from pipeline.predictors.triton_repository import export_triton as export
    from schemas.values import parse_image_size

    options = parse_options(storage_options)
    serving = check_serving(Serving(dtype, max_batch, instances, gpu))
    info = inspect_model(
        model,
        revision=revision,
        image_size=parse_image_size(image_size),
        beit_final_norm=beit_final_norm,
        storage_options=options,
    )
    names = export(info, out, serving, name=name, onnx=onnx, storage_options=options)
    if as_json:
        emit(json.dumps({"repository": out, "models": names, "digest": info.digest}))
        return 0
    emit("\n".join(f"{out.rstrip('/')}/{one}" for one in names))
    command = f"patchstream embed SOURCE --model {model} --backend triton --triton-url grpc://HOST:8001"
    # What decides the computation: a run without it is another one, which the client refuses.
    for option, value in (("--revision", revision), ("--image-size", image_size), ("--triton-model", name)):
        command += f" {option} {value}" if value else ""
    command += " --beit-final-norm" if beit_final_norm else ""
    emit(f"next: tritonserver --model-repository={out}\n      {command} --out DIR", to_stderr=True)
    return 0


COMMANDS: dict[str, Callable[..., Any]] = {"export-triton": export_triton}

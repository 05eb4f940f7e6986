"""`model.py` of an exported model: runs inside Triton's Python back end, beside a copy of `pipeline.models`.

Tensors cross over as DLPack, without NumPy in between: the back end's own NumPy path gives empty outputs under
NumPy 2. Interface: https://github.com/triton-inference-server/python_backend, `TritonPythonModel`.
"""

import json
import sys
from pathlib import Path
from typing import Any


class TritonPythonModel:
    """One instance: all requests that the server hands over at once go through one forward pass."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the checkpoint beside this file. Raises if it is not the one that config.pbtxt was written for."""
        folder = Path(args["model_repository"]) / args["model_version"]
        sys.path.insert(0, str(folder / "package"))
        import torch

        from pipeline.models import inspect_model, load_model
        from pipeline.models.gpu import plan_gpu
        from pipeline.models.precision import describe_hardware

        config = json.loads(args["model_config"])
        settings = {key: value["string_value"] for key, value in config["parameters"].items()}
        height, width, _ = (int(size) for size in config["input"][0]["dims"])
        info = inspect_model(
            str(folder / settings["checkpoint"]),
            image_size=(height, width),
            beit_final_norm=settings["beit_final_norm"] == "true",
        )
        if info.digest != settings["digest"]:
            raise ValueError(f"checkpoint has digest {info.digest}, config.pbtxt says {settings['digest']}")
        on_gpu = args["model_instance_kind"] == "GPU"
        self._device = torch.device(f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu")
        if on_gpu:
            with torch.cuda.device(self._device):
                hardware = describe_hardware(cuda=True)
            bias = info.network.relative_positions != "none"
            plan = plan_gpu(hardware, settings["dtype"], attention_bias=bias, work_gflop=0)
            # torch itself takes cuDNN's attention also where `plan_gpu` has it out for wrong results.
            torch.backends.cuda.enable_cudnn_sdp("CUDNN_ATTENTION" in plan.attention)
        self._model = load_model(info, dtype=getattr(torch, settings["dtype"]), device=self._device)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request, with the outputs that it asked for."""
        import torch
        import triton_python_backend_utils as triton  # type: ignore[import-not-found]
        from torch.utils.dlpack import from_dlpack

        inputs = [triton.get_input_tensor_by_name(request, "pixels") for request in requests]
        batches = [from_dlpack(tensor.to_dlpack()) for tensor in inputs]
        pixels = torch.cat(batches) if len(batches) > 1 else batches[0]
        outputs = self._model(pixels.to(self._device))
        host = {name: getattr(outputs, name) for name in self._asked(requests)}
        host = {name: tensor.float().cpu() for name, tensor in host.items()}
        responses, start = [], 0
        for request, batch in zip(requests, batches, strict=True):
            end = start + len(batch)
            responses.append(
                triton.InferenceResponse(
                    [
                        triton.Tensor.from_dlpack(name, host[name][start:end].contiguous())
                        for name in request.requested_output_names()
                    ]
                )
            )
            start = end
        return responses

    @staticmethod
    def _asked(requests: list[Any]) -> set[str]:
        return {name for request in requests for name in request.requested_output_names()}

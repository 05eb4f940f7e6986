"""The exported module on a GPU, as far as it can be told without one."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import text_format
from google.protobuf.json_format import MessageToDict
from support.served_model import Exported, export
from tritonclient.grpc.model_config_pb2 import ModelConfig

import pipeline.models
from pipeline.predictors.torch_triton_model import TritonPythonModel


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(tmp_path_factory.mktemp("exported"))


@pytest.mark.parametrize(
    ("capability", "cudnn", "allowed"),
    [((9, 0), 91900, True), ((9, 0), 91500, False), ((10, 0), 91900, False), ((8, 0), 91900, False)],
)
def test_cudnn_attends_only_where_it_does_in_an_actor(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cudnn: int, allowed: bool
) -> None:
    """torch takes it by itself on Blackwell too, where a single query came out wrong."""
    entered: list[Any] = []
    placed: list[Any] = []
    permitted: list[bool] = []
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(entered.append(device)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", permitted.append)
    monkeypatch.setattr(pipeline.models, "load_model", lambda info, *, dtype, device: placed.append((dtype, device)))
    place = exported.repository / exported.name
    config = MessageToDict(
        text_format.Parse(Path(place, "config.pbtxt").read_text(), ModelConfig()), preserving_proto_field_name=True
    )
    config["parameters"]["dtype"]["string_value"] = "bfloat16"
    given = {"model_repository": str(place), "model_version": "1", "model_config": json.dumps(config)}
    TritonPythonModel().initialize({**given, "model_instance_kind": "GPU", "model_instance_device_id": "1"})
    assert placed == [(torch.bfloat16, torch.device("cuda:1"))]
    assert permitted == [allowed]
    assert entered == [torch.device("cuda:1")], "another GPU of the server may be of another kind"

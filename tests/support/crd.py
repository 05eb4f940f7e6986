"""Custom resources against their CRD, stricter than an API server: an unknown field is an error, not pruned."""

import copy
import os
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

CRDS = Path(os.environ.get("PATCHSTREAM_KUBERAY_CRDS", Path(__file__).parents[3] / "shared/kuberay-crds"))
FILES = {
    "RayCluster": "ray.io_rayclusters.yaml",
    "RayJob": "ray.io_rayjobs.yaml",
    "RayCronJob": "ray.io_raycronjobs.yaml",
}

METADATA = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


def close(schema: Any) -> Any:
    """JSON Schema of a structural OpenAPI v3 schema in which every object with named fields takes no others.

    A structural schema (Kubernetes, "Specifying a structural schema") names all fields outside `anyOf` and its
    kin, so that closing the objects there forbids nothing that is allowed.
    """
    if isinstance(schema, list):
        return [close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: close(value) if key != "enum" else value for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema and "additionalProperties" not in schema:
        closed["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields", False))
    return closed


@cache
def schema_of(kind: str, api_version: str) -> dict[str, Any]:
    """Closed schema of a KubeRay kind. Raises ValueError if the CRD does not serve that version."""
    definition = yaml.load((CRDS / FILES[kind]).read_text(), Loader=yaml.CSafeLoader)
    group = definition["spec"]["group"]
    for version in definition["spec"]["versions"]:
        if version["served"] and f"{group}/{version['name']}" == api_version:
            schema: dict[str, Any] = close(copy.deepcopy(version["schema"]["openAPIV3Schema"]))
            schema["properties"]["metadata"] = METADATA
            return schema
    raise ValueError(f"{kind}: {api_version} is not served by the CRD")


def problems(resource: dict[str, Any]) -> list[str]:
    """What the CRD finds wrong with a resource, each line led by its place."""
    schema = schema_of(resource["kind"], resource["apiVersion"])
    errors = jsonschema.Draft202012Validator(schema).iter_errors(resource)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]

"""`kustomize build` for the part of kustomize that deploy/kuberay uses, so that the tests need no binary.

Anything outside that part is an error and not ignored. Where `kubectl` is installed, a test compares the two.
Order within one kustomization, as kustomize has it: resources, generators, components, then namespace, patches,
images and replacements over everything gathered so far; local-config resources are dropped last.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

KINDS = {"kustomize.config.k8s.io/v1beta1": "Kustomization", "kustomize.config.k8s.io/v1alpha1": "Component"}
KEYS = {
    "apiVersion",
    "kind",
    "resources",
    "components",
    "namespace",
    "images",
    "configMapGenerator",
    "patches",
    "replacements",
}
LOCAL_CONFIG = "config.kubernetes.io/local-config"
Resource = dict[str, Any]


def build(folder: Path, *more: Path) -> list[Resource]:
    """Resources that `folder/kustomization.yaml` renders to, with the components `more` as if it named them last.
    Raises ValueError for what is not understood."""
    return _accumulate(folder, [], more)


def _accumulate(folder: Path, gathered: list[Resource], more: Sequence[Path] = ()) -> list[Resource]:
    config = _load((folder / "kustomization.yaml").read_text())[0]
    _only(config, KEYS, folder)
    if KINDS.get(config["apiVersion"]) != config["kind"]:
        raise ValueError(f"{folder}: {config['kind']} is not of {config['apiVersion']}")
    for name in config.get("resources", []):
        path = folder / name
        gathered += build(path) if path.is_dir() else _load(path.read_text())
    gathered += [_config_map(folder, generator) for generator in config.get("configMapGenerator", [])]
    for component in [*(folder / name for name in config.get("components", [])), *more]:
        gathered = _accumulate(component, gathered)
    for resource in gathered if "namespace" in config else []:
        resource["metadata"]["namespace"] = config["namespace"]
    for patch in config.get("patches", []):
        _patch(folder, patch, gathered)
    for image in config.get("images", []):
        _only(image, {"name", "newName", "newTag"}, folder)
        for resource in gathered:
            _set_image(resource, image)
    for replacement in config.get("replacements", []):
        _replace(folder, replacement, gathered)
    return [item for item in gathered if item["metadata"].get("annotations", {}).get(LOCAL_CONFIG) != "true"]


def _load(text: str) -> list[Any]:
    return list(yaml.load_all(text, Loader=yaml.CSafeLoader))


def _only(mapping: dict[str, Any], known: set[str], place: Path) -> None:
    unknown = set(mapping) - known
    if unknown:
        raise ValueError(f"{place}: {sorted(unknown)} not among {sorted(known)}")


def _config_map(folder: Path, generator: dict[str, Any]) -> Resource:
    _only(generator, {"name", "files", "options"}, folder)
    if generator.get("options") != {"disableNameSuffixHash": True}:
        raise ValueError(f"{folder}: a generated name with a hash cannot be found by the references in a RayCluster")
    data = {name: (folder / name).read_text() for name in generator["files"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": data}


def _select(gathered: list[Resource], selector: dict[str, str], place: Path) -> list[Resource]:
    _only(selector, {"group", "version", "kind", "name"}, place)
    api_version = f"{selector['group']}/{selector['version']}" if "group" in selector else None
    chosen = [
        item
        for item in gathered
        if item["kind"] == selector["kind"]
        and item["metadata"]["name"] == selector["name"]
        and api_version in (None, item["apiVersion"])
    ]
    if not chosen:
        raise ValueError(f"{place}: nothing is selected by {selector}")
    return chosen


def _patch(folder: Path, patch: dict[str, Any], gathered: list[Resource]) -> None:
    _only(patch, {"path", "patch", "target"}, folder)
    text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text()
    for resource in _select(gathered, patch["target"], folder):
        for operation in _load(text)[0]:
            _operate(resource, operation)


def _operate(resource: Resource, operation: dict[str, Any]) -> None:
    """One JSON Patch operation (RFC 6902): add, replace or test."""
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    node: Any = resource
    for part in parents:
        node = node[int(part) if isinstance(node, list) else part]
    value = copy.deepcopy(operation["value"])
    key = int(last) if isinstance(node, list) and last != "-" else last
    match operation["op"]:
        case "add" if key == "-":
            node.append(value)
        case "add" if isinstance(node, list):
            node.insert(key, value)
        case "add":
            node[key] = value
        case "replace":
            if isinstance(node, dict) and key not in node:
                raise ValueError(f"replace {operation['path']}: no such field")
            node[key] = value
        case "test":
            if node[key] != value:
                raise ValueError(f"test {operation['path']}: {node[key]!r} is not {value!r}")
        case other:
            raise ValueError(f"operation {other!r}")


def _set_image(node: Any, image: dict[str, str]) -> None:
    if isinstance(node, list):
        for item in node:
            _set_image(item, image)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers") and isinstance(value, list):
                for container in value:
                    if container.get("image", "").split(":")[0] == image["name"]:
                        container["image"] = f"{image['newName']}:{image['newTag']}"
            _set_image(value, image)


def _replace(folder: Path, replacement: dict[str, Any], gathered: list[Resource]) -> None:
    _only(replacement, {"source", "targets"}, folder)
    source = dict(replacement["source"])
    node: Any = _select(gathered, {key: source[key] for key in ("kind", "name")}, folder)[0]
    for part in source["fieldPath"].split("."):
        node = node[int(part) if isinstance(node, list) else part]
    for target in replacement["targets"]:
        _only(target, {"select", "fieldPaths", "options"}, folder)
        for resource in _select(gathered, target["select"], folder):
            for path in target["fieldPaths"]:
                _assign(resource, path.split("."), copy.deepcopy(node), target.get("options", {}).get("create", False))


def _assign(node: Any, path: list[str], value: Any, create: bool) -> None:
    for part in path[:-1]:
        node = node[int(part) if isinstance(node, list) else part]
    if path[-1] not in node and not create:
        raise ValueError(f"{'.'.join(path)}: no such field")
    node[path[-1]] = value

"""Which machines the spot overlays take, by the labels that clouds and autoscalers give them."""

from pathlib import Path

import pytest
from support.kustomize import build

OVERLAY = Path(__file__).parents[2] / "deploy/kuberay/overlays/spot/job"


@pytest.mark.parametrize(
    "labels",
    [
        {"karpenter.sh/capacity-type": "spot"},
        {"eks.amazonaws.com/capacityType": "SPOT"},
        {"capacityType": "SPOT"},  # cluster-autoscaler's guess at an EKS group that has no machine yet
        {"cloud.google.com/gke-spot": "true"},
        {"kubernetes.azure.com/scalesetpriority": "spot"},
    ],
    ids=lambda labels: next(iter(labels)),
)
def test_a_spot_machine_of_each_cloud_is_taken(labels: dict[str, str]) -> None:
    (job,) = [item for item in build(OVERLAY) if item["kind"] == "RayJob"]
    (gpu,) = [g for g in job["spec"]["rayClusterSpec"]["workerGroupSpecs"] if g["groupName"] == "gpu"]
    required = gpu["template"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    terms = [term["matchExpressions"] for term in required["nodeSelectorTerms"]]
    assert all(expression["operator"] == "In" for term in terms for expression in term)
    assert any(all(labels.get(e["key"]) in e["values"] for e in term) for term in terms)

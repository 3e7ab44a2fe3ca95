"""What the client makes of the manifests is as restricted, as valid and as bounded as they are."""

from __future__ import annotations

import re

import kubernetes_validate
import pytest

from tunemill.kube.driver import driver_job, support
from tunemill.kube.render import Request, fill, pick
from tunemill.kube.settings import Cluster

from .conftest import Json, render
from .test_manifests import NEWEST, OLDEST, STAGE_NAMES, allows, labels_of
from .test_manifests_restricted import broken

DIGEST = "sha256:" + "ab" * 32
CLUSTER = Cluster(
    namespace="tunemill",
    registry="registry.example.org/tunemill",
    images={"store": DIGEST},
    queue="gpu",
    nodeSelector={"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
    tolerations=[{"key": "reserved", "operator": "Exists", "effect": "NoSchedule"}],
    store={"url": "s3://bucket/tunemill", "endpoint": "https://s3.example.org"},
    cacheVolume="tunemill-cache",
)
OVERLAYS = ("overlay-laptop", "overlay-university", "overlay-cloud-spot", "all-components")


def request(stage: str, **more: object) -> Request:
    values = {
        "stage": stage,
        "name": f"{stage}-llama3-cap-0123456789",
        "run": "llama3-cap",
        "arguments": (stage, "--model", "llama3", "--task", "cap", "--set", "seed=7"),
        "image": f"registry.example.org/tunemill/{stage}@{DIGEST}",
        "key": "0123456789" * 6,
        "output": "llama3-cap/adapter",
        "gpus": 2,
        "memory": "48Gi",
    }
    return Request(**{**values, **more})  # type: ignore[arg-type]


def valid(thing: Json) -> None:
    for version in (OLDEST, NEWEST):
        kubernetes_validate.validate(thing, version, strict=True)


@pytest.mark.parametrize("stage", STAGE_NAMES)
@pytest.mark.parametrize("case", OVERLAYS)
def test_a_submitted_job_is_restricted_and_valid(case: str, stage: str) -> None:
    job = fill(pick(list(render(case)), stage), request(stage, files=("mine.yaml",)), CLUSTER)
    valid(job)
    pod = job["spec"]["template"]
    assert broken(pod) == set()
    (container,) = pod["spec"]["containers"]
    assert container["image"].endswith(DIGEST)
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_several_nodes_get_the_client_s_arguments_behind_the_rendezvous() -> None:
    job = fill(pick(list(render("component-multinode")), "train"), request("train"), CLUSTER)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"][2] == "tunemill.train.launch"
    assert container["args"] == list(request("train").arguments)


def test_each_shard_keeps_its_index_behind_the_client_s_arguments() -> None:
    job = fill(pick(list(render("component-shards")), "infer"), request("infer"), CLUSTER)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"][: len(request("infer").arguments)] == list(request("infer").arguments)
    assert container["args"][-1] == "shard_index=$(JOB_COMPLETION_INDEX)"


def test_the_pipeline_s_driver_is_restricted_and_reaches_only_the_api() -> None:
    objects = render("overlay-university")
    job = driver_job(pick(list(objects), "fetch"), request("evaluate"), "0" * 64, 3600, CLUSTER)
    for thing in (job, *support()):
        valid(thing)
    pod = job["spec"]["template"]
    assert broken(pod) == set()
    assert pod["spec"]["automountServiceAccountToken"] is False  # it has a token of its own that expires
    assert re.search(rf"/store@{DIGEST}$", pod["spec"]["containers"][0]["image"])
    assert not allows(objects, "Egress", pod["metadata"]["labels"], "140.82.121.3", 443)
    assert not allows(objects, "Ingress", pod["metadata"]["labels"], labels_of("train"), 80)

"""What a cluster offers and what this user may do in it: the questions behind ``tunemill cluster init``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tunemill.errors import DeniedError
from tunemill.kube.api import Api, Json, NotFound
from tunemill.kube.follow import kueue_version

GPU_NAMES = ("nvidia.com/gpu", "amd.com/gpu", "gpu.intel.com/i915", "gpu.intel.com/xe")
GPU_MEMORY = "nvidia.com/gpu.memory"  # a label, in MiB
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
ENFORCE = "pod-security.kubernetes.io/enforce"
NEEDED = (
    *(("batch", "jobs", verb) for verb in ("create", "get", "list", "watch", "delete")),
    *(("", "pods", verb) for verb in ("get", "list", "watch")),
    ("", "pods/log", "get"),
    ("", "events", "list"),
    ("", "events", "watch"),
    ("", "configmaps", "create"),
    ("", "serviceaccounts", "create"),
)
"""Group, resource and verb of what submitting and following take."""


@dataclass(frozen=True)
class Found:
    """What looking found; None and empty mean that it may not be read or is not there."""

    version: str
    namespace_exists: bool | None
    pod_security: str | None
    """Level that the namespace enforces."""
    kueue: str | None
    """Its API version."""
    queues: Sequence[str]
    gpus: Sequence[tuple[str, int, str]] | None
    """Resource, the most of one node, that node; None where nodes cannot be listed."""
    gpu_memory: str | None
    """Of the largest GPU, as NVIDIA's feature discovery labels nodes."""
    storage_class: str | None
    secret: bool | None
    missing: Sequence[str] = field(default_factory=tuple)
    """Rights that this user lacks: ``create jobs.batch``."""


def look_around(api: Api, secret: str) -> Found:
    """Ask for everything.

    Raises:
        TunemillError: the server does not answer, or accepts no credentials.
    """
    version = api.get("/version")
    missing = [_spoken(right) for right in NEEDED if not _may(api, right)]
    namespace = _try(api, f"/api/v1/namespaces/{api.namespace}")
    kueue = kueue_version(api)
    nodes = _items(api, "/api/v1/nodes")
    return Found(
        version=str(version.get("gitVersion", "")),
        namespace_exists=None if namespace is None else bool(namespace),
        pod_security=((namespace or {}).get("metadata", {}).get("labels") or {}).get(ENFORCE),
        kueue=kueue,
        queues=_names(_items(api, api.path(kueue, "localqueues")) if kueue else None),
        gpus=None if nodes is None else gpu_offers(nodes),
        gpu_memory=gpu_memory(nodes or []),
        storage_class=_default_class(_items(api, "/apis/storage.k8s.io/v1/storageclasses")),
        secret=_is_there(_try(api, f"{api.path('v1', 'secrets')}/{secret}")),
        missing=missing,
    )


def gpu_offers(nodes: Sequence[Json]) -> list[tuple[str, int, str]]:
    """Return for each GPU resource the most that one node has, with that node's name."""
    most: dict[str, tuple[int, str]] = {}
    for node in nodes:
        allocatable = node.get("status", {}).get("allocatable") or {}
        for name in (name for name in allocatable if name in GPU_NAMES):
            offer = (int(allocatable[name]), node["metadata"]["name"])
            most[name] = max(most.get(name, (0, "")), offer)
    return [(name, number, node) for name, (number, node) in sorted(most.items()) if number]


def gpu_memory(nodes: Sequence[Json]) -> str | None:
    """Return the memory of the largest GPU as a quantity, or None where no node has the label."""
    labels = [node["metadata"].get("labels") or {} for node in nodes]
    sizes = [int(found[GPU_MEMORY]) for found in labels if str(found.get(GPU_MEMORY, "")).isdecimal()]
    return f"{max(sizes)}Mi" if sizes else None


def _may(api: Api, right: tuple[str, str, str]) -> bool:
    group, resource, verb = right
    resource, _, subresource = resource.partition("/")
    attributes = {"namespace": api.namespace, "verb": verb, "group": group, "resource": resource}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes | ({"subresource": subresource} if subresource else {})},
    }
    answer = api.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
    return bool(answer.get("status", {}).get("allowed"))


def _spoken(right: tuple[str, str, str]) -> str:
    group, resource, verb = right
    return f"{verb} {resource}.{group}" if group else f"{verb} {resource}"


def _try(api: Api, path: str) -> Json | None:
    """Return an object, {} when it is not there, None when it may not be read."""
    try:
        return api.get(path)
    except NotFound:
        return {}
    except DeniedError:
        return None


def _items(api: Api, path: str) -> list[Json] | None:
    found = _try(api, path)
    return None if found is None else list(found.get("items") or [])


def _names(items: Sequence[Json] | None) -> list[str]:
    return [item["metadata"]["name"] for item in items or []]


def _is_there(thing: Json | None) -> bool | None:
    return None if thing is None else bool(thing)


def _default_class(classes: Sequence[Json] | None) -> str | None:
    for found in classes or []:
        if (found["metadata"].get("annotations") or {}).get(DEFAULT_CLASS) == "true":
            return str(found["metadata"]["name"])
    return None

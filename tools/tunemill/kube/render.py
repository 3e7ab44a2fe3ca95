"""From the kustomize tree to the one Job that is submitted.

The tree decides what is the same for everybody (security, volumes, retries); this module fills in what
belongs to one request. Nothing is taken away from the tree but a GPU that was not asked for.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunemill.errors import ConfigurationError
from tunemill.kube.api import Json
from tunemill.kube.settings import Cluster

CONTAINER = "stage"
FILES = "/run/tunemill"
NAME_LABEL, COMPONENT_LABEL = "app.kubernetes.io/name", "app.kubernetes.io/component"
RUN_LABEL = "tunemill.dev/run"
KEY, OUTPUT, ARGUMENTS = "tunemill.dev/action-key", "tunemill.dev/output", "tunemill.dev/arguments"
SPEC = "tunemill.dev/spec"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


@dataclass(frozen=True)
class Request:
    """What one Job is to do, and with what."""

    stage: str
    name: str
    """Of the Job."""
    run: str
    arguments: tuple[str, ...]
    """Words after ``tunemill``, the stage's name first."""
    image: str
    """``name@sha256:…``."""
    key: str
    """Hex digits that decide whether two requests are the same."""
    output: str
    gpus: int
    memory: str | None
    """A Kubernetes quantity; the tree's own if None."""
    work: str | None = None
    """Size of /work, as above."""
    files: tuple[str, ...] = ()
    """Names of files that the pod finds under ``FILES``, from a ConfigMap of the Job's name."""
    shards: int | None = None
    nodes: int | None = None


def kustomize(cluster: Cluster, extra: Sequence[str] = ()) -> list[Json]:
    """Return every object of the cluster's overlay with its components, and with ``extra`` ones.

    Raises:
        ConfigurationError: kubectl is missing, or the tree does not build.
    """
    overlay = (cluster.directory / cluster.overlay).resolve()
    if not (overlay / "kustomization.yaml").is_file():
        raise ConfigurationError(f"overlay: {overlay} has no kustomization.yaml")
    wanted = list(cluster.components)
    present = {Path(name).name for name in [*wanted, *_components_of(overlay)]}
    wanted += [name for name in extra if name not in present and not _is_optional(cluster, overlay, name)]
    components = [_component(cluster, overlay, name) for name in wanted]
    with tempfile.TemporaryDirectory(prefix="tunemill-") as scratch:
        root = Path(scratch).resolve()
        tree = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(overlay, root)],
            "components": [os.path.relpath(component, root) for component in components],
        }
        (root / "kustomization.yaml").write_text(yaml.safe_dump(tree), "utf-8")
        built = _kubectl("kustomize", str(root))
    return [found for found in yaml.safe_load_all(built) if found]


def pick(objects: Sequence[Json], stage: str) -> Json:
    """Return the Job of one stage.

    Raises:
        ConfigurationError: the overlay has none, or several.
    """
    jobs = [found for found in objects if found.get("kind") == "Job"]
    chosen = [job for job in jobs if job["metadata"].get("labels", {}).get(COMPONENT_LABEL) == stage]
    if len(chosen) != 1:
        raise ConfigurationError(f"the overlay has {len(chosen)} Jobs for {stage}, expected one")
    return chosen[0]


def fill(template: Json, request: Request, cluster: Cluster) -> Json:
    """Return the Job of a request, made from its stage's.

    Raises:
        ConfigurationError: the template has no container of that name.
    """
    job = copy.deepcopy(template)
    metadata, pod = job["metadata"], job["spec"]["template"]
    metadata["name"] = request.name
    metadata.pop("namespace", None)
    labels = {RUN_LABEL: label_value(request.run)}
    for labelled in (metadata, pod.setdefault("metadata", {})):
        labelled["labels"] = {**(labelled.get("labels") or {}), **labels}
    metadata["annotations"] = {**(metadata.get("annotations") or {}), **_annotations(request)}
    if cluster.queue:
        metadata["labels"][QUEUE_LABEL] = cluster.queue
        job["spec"]["suspend"] = True  # Kueue starts it
    container = stage_container(pod)
    container["image"] = request.image
    container["args"] = [*request.arguments, *(container.get("args") or [])[1:]]  # a component may add to it
    _set_environment(container, {"TUNEMILL_IMAGE": request.image, **_store_environment(cluster)})
    if request.shards:
        _set_environment(container, {"SHARDS": str(request.shards)})
        _set_completions(job, request.shards)
    if request.nodes:
        _set_environment(container, {"NODES": str(request.nodes)})
        _set_completions(job, request.nodes)
    _set_resources(container, request, cluster)
    _place(pod["spec"], cluster)
    _set_volumes(pod["spec"], request, cluster)
    if request.files:
        mount(pod["spec"], container, "files", FILES, {"configMap": {"name": request.name}})
    return job


def stage_container(pod: Json) -> Json:
    """Return the container of a pod (or of a pod template) that runs the stage.

    Raises:
        ConfigurationError: there is none.
    """
    for container in pod["spec"]["containers"]:
        if container["name"] == CONTAINER:
            found: Json = container
            return found
    raise ConfigurationError(f"the Job has no container named '{CONTAINER}'")


def mount(spec: Json, container: Json, name: str, path: str, source: Json) -> None:
    """Add a volume and mount it read-only."""
    spec.setdefault("volumes", []).append({"name": name, **source})
    container.setdefault("volumeMounts", []).append({"name": name, "mountPath": path, "readOnly": True})


def label_value(text: str) -> str:
    """Return what of a text a label may hold: at most 63 of A-Z a-z 0-9 - _ ., alphanumeric at both ends."""
    allowed = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "-" for letter in text
    )
    return allowed[:63].strip("-_.")


def _annotations(request: Request) -> dict[str, str]:
    arguments = json.dumps(list(request.arguments), ensure_ascii=False)
    return {KEY: request.key, OUTPUT: request.output, ARGUMENTS: arguments}


def _store_environment(cluster: Cluster) -> dict[str, str]:
    if cluster.store is None:
        return {}
    values = {
        "TUNEMILL_STORE": cluster.store.url,
        "AWS_ENDPOINT_URL_S3": cluster.store.endpoint,
        "AWS_DEFAULT_REGION": cluster.store.region,
    }
    return {name: value for name, value in values.items() if value}


def _set_completions(job: Json, number: int) -> None:
    if job["spec"].get("completionMode") == "Indexed":
        job["spec"] |= {"completions": number, "parallelism": number}


def _set_environment(container: Json, values: dict[str, str]) -> None:
    if "TUNEMILL_STORE" in values:  # cluster.yaml says all of it, also that there is no endpoint
        sources = [source for source in container.get("envFrom") or [] if not _is_store_map(source)]
        container.pop("envFrom", None)
        if sources:
            container["envFrom"] = sources
    kept = [entry for entry in container.get("env") or [] if entry["name"] not in values]
    container["env"] = kept + [{"name": name, "value": value} for name, value in values.items()]


def _is_store_map(source: Json) -> bool:
    return bool((source.get("configMapRef") or {}).get("name") == "tunemill-store")


def _set_resources(container: Json, request: Request, cluster: Cluster) -> None:
    resource = cluster.gpu.resource if cluster.gpu else "nvidia.com/gpu"
    resources = container.setdefault("resources", {})
    for part in ("requests", "limits"):
        amounts = resources.setdefault(part, {})
        for name in [name for name in amounts if name in (resource, "nvidia.com/gpu")]:
            del amounts[name]
        if request.gpus:
            amounts[resource] = str(request.gpus)  # an extended resource's request is its limit
        if request.memory:
            amounts["memory"] = request.memory
    if request.work and "ephemeral-storage" in resources["limits"]:
        resources["limits"]["ephemeral-storage"] = request.work  # /work counts towards it


def _place(spec: Json, cluster: Cluster) -> None:
    if cluster.priority_class:
        spec["priorityClassName"] = cluster.priority_class
    if cluster.node_selector:
        spec["nodeSelector"] = {**(spec.get("nodeSelector") or {}), **cluster.node_selector}
    own = [toleration.model_dump(exclude_none=True) for toleration in cluster.tolerations]
    tolerations = spec.get("tolerations") or []
    tolerations += [toleration for toleration in own if toleration not in tolerations]
    if tolerations:
        spec["tolerations"] = tolerations


def _set_volumes(spec: Json, request: Request, cluster: Cluster) -> None:
    for volume in spec.get("volumes") or []:
        if cluster.store and "secret" in volume and volume["secret"].get("secretName") == "tunemill-store":
            volume["secret"]["secretName"] = cluster.store.secret
        if volume["name"] != "work":
            continue
        if cluster.cache_volume:
            volume.pop("emptyDir", None)
            volume.pop("ephemeral", None)
            volume["persistentVolumeClaim"] = {"claimName": cluster.cache_volume}
        elif request.work and "emptyDir" in volume:
            volume["emptyDir"] = {**(volume["emptyDir"] or {}), "sizeLimit": request.work}


def _is_optional(cluster: Cluster, overlay: Path, name: str) -> bool:
    """An overlay of one's own may have no component for GPUs; their number is filled in all the same."""
    return name == "gpu" and _find_component(cluster, overlay, name) is None


def _component(cluster: Cluster, overlay: Path, name: str) -> Path:
    found = _find_component(cluster, overlay, name)
    if found is None:
        raise ConfigurationError(f"components: there is no '{name}' beside {overlay}, nor at that path")
    return found


def _find_component(cluster: Cluster, overlay: Path, name: str) -> Path | None:
    """Return a component by its path, or by its name in a ``components`` above the overlay."""
    places = [cluster.directory / name, *(above / "components" / name for above in overlay.parents)]
    return next((place.resolve() for place in places if (place / "kustomization.yaml").is_file()), None)


def _components_of(overlay: Path) -> list[str]:
    tree: Any = yaml.safe_load((overlay / "kustomization.yaml").read_text("utf-8"))
    return list((tree or {}).get("components") or [])


def _kubectl(*words: str) -> str:
    try:
        # It only builds files, but asks the cluster of its kubeconfig for a version, for up to 5 s.
        offline = {**os.environ, "KUBECONFIG": os.devnull}
        done = subprocess.run(["kubectl", *words], capture_output=True, text=True, check=False, env=offline)
    except FileNotFoundError as error:
        raise ConfigurationError(
            "kubectl is not installed here, which builds the manifests: https://kubernetes.io/docs/tasks/tools"
        ) from error
    if done.returncode != 0:
        raise ConfigurationError(f"kubectl {words[0]} fails: {' '.join(done.stderr.split())}")
    return done.stdout

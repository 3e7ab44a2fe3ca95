"""Submitting one Job: look first, let the server check it, create it, or find the one that is there.

Everything that can be known to be missing is said before anything is created. A Job that runs is never
replaced.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunemill.errors import ConfigurationError, DeniedError, TransientError, UsageError
from tunemill.kube.api import Api, Exists, Json, NotFound
from tunemill.kube.explain import gpus_of
from tunemill.kube.follow import POD_OF, kueue_version, largest
from tunemill.kube.logs import started
from tunemill.kube.outcome import finished
from tunemill.kube.render import QUEUE_LABEL, SPEC
from tunemill.kube.settings import Cluster

LARGEST_FILES = 1_000_000  # bytes; a ConfigMap holds 1 MiB
GONE_SECONDS = 120.0  # a deleted Job's pods have their grace to end
SUPPORT = {
    "ServiceAccount": "serviceaccounts",
    "ConfigMap": "configmaps",
    "NetworkPolicy": "networkpolicies",
    "Service": "services",
    "Role": "roles",
    "RoleBinding": "rolebindings",
}
"""Kinds of the tree that a Job needs beside itself, with their plurals."""

log = logging.getLogger("tunemill")


@dataclass(frozen=True)
class Submitted:
    """A Job in the cluster."""

    name: str
    uid: str
    found: bool
    """It was there already."""


def submit(api: Api, job: Json, cluster: Cluster, support: Sequence[Json] = ()) -> Submitted:
    """Create a Job, or find the one of its name that does the same.

    Raises:
        ConfigurationError: the cluster lacks what it needs, or refuses it.
        DeniedError: a right is missing.
    """
    job = sealed(job)
    present = _present(api, job)
    if present is not None:
        return present
    check(api, job, cluster)
    provide(api, support)
    api.create(api.jobs, job, dry_run=True)
    try:
        made = api.create(api.jobs, job)
    except Exists:  # another submit was faster, or our own first try whose answer was lost
        made = api.get(f"{api.jobs}/{job['metadata']['name']}")
    return Submitted(made["metadata"]["name"], made["metadata"]["uid"], False)


def keep_files(api: Api, owner: Submitted, name: str, files: Mapping[str, str]) -> None:
    """Put files where a pod that mounts them waits for them; they go when the owning Job goes.

    Raises:
        ConfigurationError: they are larger than one object may be.
    """
    if sum(map(len, files.values())) > LARGEST_FILES:
        raise ConfigurationError(f"{', '.join(files)} together are over 1 MB, more than a ConfigMap holds")
    body = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": name,
            "labels": {"app.kubernetes.io/name": "tunemill", "app.kubernetes.io/part-of": "tunemill"},
            "ownerReferences": [owner_reference(owner.name, owner.uid)],
        },
        "immutable": True,
        "data": dict(files),
    }
    path = api.path("v1", "configmaps")
    deadline = time.monotonic() + GONE_SECONDS
    while True:
        try:
            api.create(path, body)
            return
        except Exists:
            if _owner(api, f"{path}/{name}") == owner.uid:
                return
        if time.monotonic() > deadline:
            raise ConfigurationError(f"a ConfigMap '{name}' of somebody else is in the way: delete it")
        time.sleep(0.5)  # of a Job of that name that was just deleted: the cluster collects it soon


def _owner(api: Api, path: str) -> str | None:
    try:
        owners = api.get(path)["metadata"].get("ownerReferences") or [{}]
    except NotFound:
        return None
    return str(owners[0].get("uid"))


def owner_reference(name: str, uid: str) -> Json:
    """Return what makes a Job the owner of another object."""
    return {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid}


def sealed(job: Json) -> Json:
    """Return a Job with a digest of its specification, by which a later one is told apart."""
    text = json.dumps(job["spec"], sort_keys=True)
    annotations = {
        **job["metadata"].get("annotations", {}),
        SPEC: hashlib.sha256(text.encode()).hexdigest()[:16],
    }
    return {**job, "metadata": {**job["metadata"], "annotations": annotations}}


def check(api: Api, job: Json, cluster: Cluster) -> None:
    """Refuse a Job that could never start, as far as this user may look.

    Raises:
        ConfigurationError: its queue, its secret or so many GPUs on one node do not exist.
    """
    _check_namespace(api)
    _check_queue(api, job)
    _check_volumes(api, job)
    _check_gpus(api, job, cluster)


def provide(api: Api, support: Sequence[Json]) -> None:
    """Create what a Job needs beside itself and is not there; what is there stays as it is.

    Raises:
        DeniedError: it is missing, and this user may not create it.
    """
    for thing in support:
        if thing.get("kind") not in SUPPORT:
            continue
        path = api.path(thing["apiVersion"], SUPPORT[thing["kind"]])
        body = {
            **thing,
            "metadata": {key: value for key, value in thing["metadata"].items() if key != "namespace"},
        }
        try:
            if _is_there(api, path, body["metadata"]["name"]):
                continue
            api.create(path, body)
            log.info("created %s %s", thing["kind"], body["metadata"]["name"])
        except Exists:
            pass
        except DeniedError as error:
            if thing["kind"] != "NetworkPolicy":
                raise
            log.warning("without its network policy: %s", error)  # it protects others; the stage runs without


def cancel(api: Api, name: str) -> bool:
    """End a Job: its pods get SIGTERM and their grace. False when it had ended already.

    Raises:
        UsageError: there is no such Job.
    """
    job = find(api, name)
    api.delete(f"{api.jobs}/{name}", job["metadata"]["uid"], "Background")
    return finished(job) is None


def find(api: Api, name: str) -> Json:
    """Return a Job of Tunemill.

    Raises:
        UsageError: there is none of that name.
    """
    try:
        return api.get(f"{api.jobs}/{name}")
    except NotFound as error:
        raise UsageError(
            f"there is no Job '{name}' in namespace {api.namespace}: 'tunemill status' lists them"
        ) from error


def _present(api: Api, job: Json) -> Submitted | None:
    """Return the Job of the same name if it is to be followed; a useless one is removed.

    Raises:
        TransientError: it does not go away.
    """
    name = job["metadata"]["name"]
    try:
        old = api.get(f"{api.jobs}/{name}")
    except NotFound:
        return None
    if old["metadata"].get("deletionTimestamp"):
        log.info("%s is being deleted; waiting until it is gone", name)
        _wait_until_gone(api, name, old["metadata"]["uid"])
        return None
    reason = _useless(api, old, job)
    if reason is None:
        log.info("%s is there already: going on with it", name)
        return Submitted(name, old["metadata"]["uid"], True)
    log.info("%s %s; replacing it", name, reason)
    api.delete(f"{api.jobs}/{name}", old["metadata"]["uid"], "Foreground")
    _wait_until_gone(api, name, old["metadata"]["uid"])
    return None


def _useless(api: Api, old: Json, new: Json) -> str | None:
    """Say why a Job of the same name is not the one to follow."""
    ended = finished(old)
    if ended == "Failed":
        return "failed before"
    if ended == "Complete":
        return "ran before, and its output is not known here"
    if (old["metadata"].get("annotations") or {}).get(SPEC) == new["metadata"]["annotations"][SPEC]:
        return None
    pods = api.get(api.pods, labelSelector=f"{POD_OF}={old['metadata']['uid']}")["items"]
    if any(started(pod) != "waiting" for pod in pods):
        log.warning("%s runs with other settings than these", old["metadata"]["name"])
        return None
    return "has not started and was submitted with other settings"


def _wait_until_gone(api: Api, name: str, uid: str) -> None:
    deadline = time.monotonic() + GONE_SECONDS
    while time.monotonic() < deadline:
        try:
            if api.get(f"{api.jobs}/{name}")["metadata"]["uid"] != uid:
                return
        except NotFound:
            return
        time.sleep(0.5)
    raise TransientError(f"the Job {name} is still being deleted after {GONE_SECONDS:.0f} s: try again later")


def _check_namespace(api: Api) -> None:
    try:
        api.get(f"/api/v1/namespaces/{api.namespace}")
    except NotFound as error:
        raise ConfigurationError(
            f"there is no namespace '{api.namespace}' at {api.where}: set namespace in cluster.yaml"
        ) from error
    except DeniedError:
        log.debug("the namespace itself may not be read")


def _check_queue(api: Api, job: Json) -> None:
    queue = (job["metadata"].get("labels") or {}).get(QUEUE_LABEL)
    if not queue:
        return
    version = kueue_version(api)
    if version is None:
        raise ConfigurationError(
            f"the queue '{queue}' is unknown: this cluster has no Kueue; leave queue out"
        )
    try:
        api.get(f"{api.path(version, 'localqueues')}/{queue}")
    except NotFound as error:
        raise ConfigurationError(
            f"there is no queue '{queue}' in namespace {api.namespace}{_queues(api, version)}"
        ) from error
    except DeniedError:
        log.debug("queues may not be read; Kueue itself will say")


def _queues(api: Api, version: str) -> str:
    try:
        names = [found["metadata"]["name"] for found in api.get(api.path(version, "localqueues"))["items"]]
    except DeniedError:
        return ""
    return f": it has {', '.join(names)}" if names else ": it has none"


def _check_volumes(api: Api, job: Json) -> None:
    for volume in job["spec"]["template"]["spec"].get("volumes") or []:
        secret = volume.get("secret") or {}
        if "secretName" in secret and not secret.get("optional"):
            _need(api, "secrets", secret["secretName"], _how_to_make(secret["secretName"]))
        if claim := (volume.get("persistentVolumeClaim") or {}).get("claimName"):
            _need(api, "persistentvolumeclaims", claim, "make it, or leave cacheVolume out of cluster.yaml")


def _how_to_make(secret: str) -> str:
    make = f"kubectl create secret generic {secret} --from-file=credentials=FILE"
    return f"make it from an AWS credentials file: {make}"


def _need(api: Api, plural: str, name: str, remedy: str) -> None:
    try:
        present = _is_there(api, api.path("v1", plural), name)
    except DeniedError:
        return  # reading secrets is a right that few have; the kubelet will say
    if not present:
        raise ConfigurationError(
            f"there is no {plural.rstrip('s')} '{name}' in namespace {api.namespace}: {remedy}"
        )


def _check_gpus(api: Api, job: Json, cluster: Cluster) -> None:
    resource = cluster.gpu.resource if cluster.gpu else "nvidia.com/gpu"
    asked = gpus_of(job["spec"]["template"], resource)
    if not asked:
        return
    promised = cluster.gpu.count if cluster.gpu else None  # nodes may be started on demand
    listed = largest(api, resource)
    most = max(
        [number for number in (promised, listed[0] if listed else None) if number is not None], default=None
    )
    if most is not None and asked > most:
        where = f", {listed[1]}," if listed and listed[1] and listed[0] == most else ""
        raise ConfigurationError(
            f"{asked} GPUs are more than any node has: the largest{where} has {most} ({resource}); "
            "ask for fewer with --gpus, or raise gpu.count in cluster.yaml where nodes are started on demand"
        )


def _is_there(api: Api, path: str, name: str) -> bool:
    try:
        api.get(f"{path}/{name}")
    except NotFound:
        return False
    return True

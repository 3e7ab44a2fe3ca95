"""A pipeline that runs in the cluster: a small Job that creates the stages' Jobs, one after the other.

The client renders every stage's Job and leaves them in a ConfigMap, so the driver needs neither kubectl nor
the store, and no right but to create Jobs and to look. The stages' Jobs belong to the driver's: cancelling
the pipeline cancels the stage that runs. Their names hold a salt of this submission, so a driver whose pod
was replaced finds its own and no older ones.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from tunemill.errors import ConfigurationError
from tunemill.kube.api import Api, Exists, Json
from tunemill.kube.follow import Followed, follow
from tunemill.kube.naming import job_name
from tunemill.kube.render import (
    ARGUMENTS,
    FILES,
    KEY,
    OUTPUT,
    RUN_LABEL,
    Request,
    label_value,
    mount,
    stage_container,
)
from tunemill.kube.settings import Cluster
from tunemill.kube.submit import owner_reference

STAGE = "pipeline"
ACCOUNT = "tunemill-driver"
JOBS = "jobs.json"
TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"  # where clients look for it
TOKEN_SECONDS = 3600
LABELS = {"app.kubernetes.io/name": "tunemill", "app.kubernetes.io/part-of": "tunemill"}
OWN = {
    "TUNEMILL_JOB": "batch.kubernetes.io/job-name",
    "TUNEMILL_JOB_UID": "batch.kubernetes.io/controller-uid",
}
RULES: Sequence[Json] = (
    {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["list", "watch"]},
)

log = logging.getLogger("tunemill")


def driver_job(template: Json, like: Request, key: str, deadline: int, cluster: Cluster) -> Json:
    """Return the Job that drives a pipeline, made from a stage's, whose security it keeps.

    ``like`` is the last stage's request, whose run and output are the pipeline's; ``deadline`` is in seconds.

    Raises:
        ConfigurationError: cluster.yaml gives no digest of the store image.
    """
    job = copy.deepcopy(template)
    metadata, pod = job["metadata"], job["spec"]["template"]
    spec, container = pod["spec"], stage_container(pod)
    metadata.pop("namespace", None)
    metadata["name"] = name = job_name(STAGE, like.run, key)
    words = ["submit", STAGE, "--driver", f"{FILES}/{JOBS}"]
    metadata["annotations"] = {KEY: key, OUTPUT: like.output, ARGUMENTS: json.dumps(words)}
    labels = {**LABELS, "app.kubernetes.io/component": STAGE, RUN_LABEL: label_value(like.run)}
    metadata["labels"] = labels
    pod["metadata"] = {**(pod.get("metadata") or {}), "labels": dict(labels)}
    job["spec"]["activeDeadlineSeconds"] = deadline
    job["spec"].pop("suspend", None)  # it takes no GPU, and waits for Jobs that queue by themselves
    container["image"] = cluster.image("store")
    container["args"] = words
    container.pop("envFrom", None)
    container["env"] = [{"name": "TUNEMILL_IMAGE", "value": container["image"]}, *map(_from_label, OWN)]
    container["resources"] = {
        "requests": {"cpu": "100m", "memory": "256Mi", "ephemeral-storage": "64Mi"},
        "limits": {"cpu": "1", "memory": "512Mi", "ephemeral-storage": "256Mi"},
    }
    _only_scratch(spec, container)
    spec["serviceAccountName"] = ACCOUNT
    spec["automountServiceAccountToken"] = False
    mount(spec, container, "token", TOKEN, {"projected": {"defaultMode": 0o440, "sources": _token()}})
    mount(spec, container, "files", FILES, {"configMap": {"name": name}})
    return job


def support() -> list[Json]:
    """Return what the driver's Job needs: its account, exactly its rights, and a way to the API server."""
    metadata = {"name": ACCOUNT, "labels": LABELS}
    rbac = "rbac.authorization.k8s.io"
    subject = {"kind": "ServiceAccount", "name": ACCOUNT}
    return [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": metadata,
            "automountServiceAccountToken": False,
        },
        {"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": metadata, "rules": list(RULES)},
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": {"apiGroup": rbac, "kind": "Role", "name": ACCOUNT},
            "subjects": [subject],
        },
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": metadata,
            "spec": {
                "podSelector": {"matchLabels": {"app.kubernetes.io/component": STAGE}},
                "policyTypes": ["Egress"],
                "egress": [{"ports": [{"protocol": "TCP", "port": 443}, {"protocol": "TCP", "port": 6443}]}],
            },
        },
    ]


def drive(api: Api, path: Path) -> Followed:
    """Create the Jobs of a file in their order and wait for each; stop at the first that fails.

    Raises:
        ConfigurationError: the file or the names of the own Job are missing: this is no driver's pod.
    """
    owner = _own_job()
    jobs: list[Json] = _read(path)
    for job in jobs:
        name = job["metadata"]["name"]
        try:
            api.create(api.jobs, {**job, "metadata": {**job["metadata"], "ownerReferences": [owner]}})
        except Exists:
            log.info("%s is there already: going on with it", name)
        log.info("== %s", name)
        followed = follow(api, name)
        if followed.result.code:
            return followed
        log.info("%s: %s", name, followed.reference)
    return followed


def _own_job() -> Json:
    name, uid = (os.environ.get(variable) for variable in OWN)
    if not name or not uid:
        raise ConfigurationError("--driver is for the pod that 'tunemill submit pipeline --in-cluster' makes")
    return owner_reference(name, uid)


def _read(path: Path) -> list[Json]:
    try:
        jobs: list[Json] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} holds no Jobs: {error}") from error
    if not jobs:
        raise ConfigurationError(f"{path} holds no Jobs: it is empty")
    return jobs


def _from_label(variable: str) -> Json:
    path = f"metadata.labels['{OWN[variable]}']"
    return {"name": variable, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _only_scratch(spec: Json, container: Json) -> None:
    """Leave the pod its temporary directories; the stage's secret, cache and GPU are not the driver's."""
    spec["volumes"] = [volume for volume in spec.get("volumes") or [] if volume["name"] in ("work", "tmp")]
    for volume in spec["volumes"]:
        if volume["name"] == "work":
            volume.clear()
            volume.update({"name": "work", "emptyDir": {"sizeLimit": "64Mi"}})
    names = {volume["name"] for volume in spec["volumes"]}
    container["volumeMounts"] = [
        found for found in container.get("volumeMounts") or [] if found["name"] in names
    ]


def _token() -> list[Json]:
    namespace = {"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}
    return [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": TOKEN_SECONDS}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [namespace]}},
    ]

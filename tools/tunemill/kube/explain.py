"""Why nothing runs yet, in one line, from what the cluster says of a Job, its pods and their events.

Pure functions over JSON objects. A reason is ``hopeless`` when nothing but a person can remove it;
everything else passes when somebody's work ends, and is worth waiting for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunemill.kube.api import Json

BAD_IMAGE = {
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "RegistryUnavailable",
}
SURELY_BAD = {"ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
"""ErrImagePull alone may be one lost connection."""
STARTING = {"Pulling", "Pulled", "Created", "Started"}
ON_NODE = {"FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox", *STARTING}
BAD_CONTAINER = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError"}
# "0/5 nodes are available: 3 Insufficient nvidia.com/gpu, 2 node(s) had … preemption: …"
PREEMPTION = re.compile(r"\s*(no new claims to deallocate,)?\s*preemption:.*", re.DOTALL)


@dataclass(frozen=True)
class Why:
    """A reason to wait."""

    line: str
    hopeless: bool = False


@dataclass(frozen=True)
class Seen:
    """All that is known of a Job that does not run."""

    job: Json
    pods: Sequence[Json] = ()
    events: Sequence[Json] = ()
    """Of the Job and its pods, oldest first."""
    workload: Json | None = None
    """Kueue's, if there is one."""
    largest: tuple[int, str] | None = None
    """Most GPUs of one node, and its name; None where nodes cannot be listed."""
    resource: str = "nvidia.com/gpu"


def explain(seen: Seen) -> Why | None:
    """Return why no container of a Job runs, or None while nothing is wrong."""
    if seen.job["spec"].get("suspend"):
        return _suspended(seen)
    waiting = [pod for pod in seen.pods if pod.get("status", {}).get("phase", "Pending") == "Pending"]
    if not seen.pods:
        return _not_created(seen)
    reasons = [why for pod in waiting if (why := _pending(pod, seen))]
    return max(reasons, key=lambda why: why.hopeless, default=None)


def largest_gpu_node(nodes: Iterable[Json], resource: str) -> tuple[int, str]:
    """Return the most GPUs that one node offers, and its name."""
    offers = [
        (int(node.get("status", {}).get("allocatable", {}).get(resource, 0)), node["metadata"]["name"])
        for node in nodes
    ]
    return max(offers, default=(0, ""))


def gpus_of(pod: Json, resource: str) -> int:
    """Return how many GPUs a pod (or a pod template) asks for."""
    return sum(
        int(container.get("resources", {}).get("limits", {}).get(resource, 0))
        for container in pod["spec"].get("containers", [])
    )


def condition(thing: Json, kind: str) -> Json | None:
    """Return a condition of an object's status."""
    for found in thing.get("status", {}).get("conditions") or []:
        if found["type"] == kind:
            chosen: Json = found
            return chosen
    return None


def _suspended(seen: Seen) -> Why:
    labels: Mapping[str, Any] = seen.job["metadata"].get("labels") or {}
    queue = labels.get("kueue.x-k8s.io/queue-name")
    if not queue:
        return Why("it is suspended and has no queue label that would start it")
    if seen.workload is None:
        return Why(f"it waits in the queue {queue}")
    active = condition(seen.workload, "QuotaReserved")
    if active is None or active["status"] == "True":
        return Why(f"it waits in the queue {queue}: {_admission(seen.workload)}")
    message = _line(active.get("message", ""))
    gone = "doesn't exist" in message or "not found" in message
    return Why(f"it waits in the queue {queue}: {message or 'no quota is free'}", hopeless=gone)


def _admission(workload: Json) -> str:
    checks = workload.get("status", {}).get("admissionChecks") or []
    open_checks = [
        f"{check['name']} {check.get('message', '')}".strip() for check in checks if check["state"] != "Ready"
    ]
    return _line(", ".join(open_checks)) or "it has not been looked at yet"


def _not_created(seen: Seen) -> Why | None:
    failed = _last(seen.events, "FailedCreate")
    if failed is None:
        return None
    message = re.sub(r'^Error creating: (pods "[^"]*" is forbidden: )?', "", _line(failed.get("message", "")))
    if "violates PodSecurity" in message:
        return Why(
            f"Pod Security refuses its pods: {message.removeprefix('violates PodSecurity ')}", hopeless=True
        )
    if "exceeded quota" in message:
        return Why(f"the namespace's quota is used up: {message.removeprefix('exceeded quota: ')}")
    return Why(
        f"its pods cannot be created: {message}", hopeless="not found" in message or "forbidden" in message
    )


def _pending(pod: Json, seen: Seen) -> Why | None:
    scheduled = condition(pod, "PodScheduled")
    if scheduled and scheduled["status"] == "False":
        return _unscheduled(pod, scheduled, seen)
    for status in _container_statuses(pod):
        waiting = status.get("state", {}).get("waiting")
        if waiting and (why := _waiting(status, waiting)):
            return why
    mine = [
        event for event in seen.events if event["involvedObject"].get("uid") == pod["metadata"].get("uid")
    ]
    return _on_its_node(mine)


def _on_its_node(events: Sequence[Json]) -> Why | None:
    """Return what keeps a pod from starting on its node, unless it has got further since."""
    last = next((event for event in reversed(events) if event.get("reason") in ON_NODE), None)
    message = _line(last.get("message", "")) if last else ""
    if last is None or last["reason"] in STARTING:
        return None
    if last["reason"] == "FailedCreatePodSandBox":
        return Why(f"the node cannot start its pod: {message}")
    absent = re.search(r"(secret|configmap) .*not found", message)
    return Why(f"a volume cannot be mounted: {message}", hopeless=bool(absent))


def _unscheduled(pod: Json, scheduled: Json, seen: Seen) -> Why:
    message = PREEMPTION.sub("", _line(scheduled.get("message", ""))).rstrip(".")
    if scheduled.get("reason") == "SchedulingGated":
        return Why(f"its pod waits for a scheduling gate: {message}")
    if "PersistentVolumeClaim" in message or "persistentvolumeclaim" in message:
        return Why(f"its volume is not bound: {message}", hopeless="not found" in message)
    asked = gpus_of(pod, seen.resource)
    if asked and seen.resource in message:
        return _no_gpu(asked, message, seen)
    return Why(f"no node takes its pod: {message}")


def _no_gpu(asked: int, message: str, seen: Seen) -> Why:
    number = f"{asked} GPU" if asked == 1 else f"{asked} GPUs"
    if seen.largest is None:
        return Why(f"no node has {number} free: {message}")
    most, node = seen.largest
    if most == 0:
        return Why(f"it asks for {number} and no node has any ({seen.resource}): {message}")
    if asked > most:
        return Why(f"it asks for {number} and the largest node, {node}, has {most}: {message}")
    return Why(f"no node has {number} free, the largest, {node}, has {most} in all: {message}")


def _waiting(status: Json, waiting: Json) -> Why | None:
    reason, message = waiting.get("reason", ""), _line(waiting.get("message", ""))
    if reason in BAD_IMAGE:
        return Why(
            f"the image {status['image']} cannot be pulled: {message or reason}",
            hopeless=reason in SURELY_BAD,
        )
    if reason in BAD_CONTAINER:
        return Why(f"its container cannot start: {message or reason}", hopeless="not found" in message)
    return None


def _container_statuses(pod: Json) -> list[Json]:
    status = pod.get("status", {})
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def _last(events: Sequence[Json], reason: str) -> Json | None:
    return next((event for event in reversed(events) if event.get("reason") == reason), None)


def _line(text: str) -> str:
    return " ".join(text.split())

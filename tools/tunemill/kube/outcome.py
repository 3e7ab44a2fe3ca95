"""What became of a Job: done, failed or under way, and with which of Tunemill's exit codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunemill.errors import ConfigurationError, Stopped, TransientError
from tunemill.kube.api import Json
from tunemill.kube.explain import condition
from tunemill.kube.logs import stage_state
from tunemill.kube.render import OUTPUT


@dataclass(frozen=True)
class Result:
    """The end of a Job."""

    code: int
    line: str
    """Why it failed; empty when it did not."""


def finished(job: Json) -> str | None:
    """Return ``Complete`` or ``Failed`` once a Job has ended and its pods with it, else None.

    SuccessCriteriaMet and FailureTarget only announce it: pods may still be ending (Kubernetes 1.31).
    """
    for kind in ("Complete", "Failed"):
        found = condition(job, kind)
        if found and found["status"] == "True":
            return kind
    return None


def state(job: Json) -> str:
    """Return a word for people."""
    if kind := finished(job):
        return {"Complete": "done", "Failed": "failed"}[kind]
    if job["metadata"].get("deletionTimestamp"):
        return "ending"
    if job["spec"].get("suspend"):
        return "queued"
    status = job.get("status", {})
    return "running" if status.get("active", 0) and status.get("ready", 0) else "waiting"


def output_of(job: Json) -> str:
    """Return the name of the output that a Job makes."""
    return str((job["metadata"].get("annotations") or {}).get(OUTPUT, ""))


def result_of(job: Json, pods: Sequence[Json]) -> Result:
    """Return the result of a finished Job; the exit code is the one that its stage ended with."""
    if finished(job) == "Complete":
        return Result(0, "")
    name = job["metadata"]["name"]
    why = condition(job, "Failed") or {}
    reason, message = why.get("reason", ""), " ".join(str(why.get("message", "")).split())
    ended = _last_ended(pods)
    if ended is None:
        return Result(
            TransientError.exit_code, f"{name} failed: {message or reason}; none of its pods is left"
        )
    terminated = stage_state(ended).get("terminated") or {}
    code = int(terminated.get("exitCode", 0))
    if terminated.get("reason") == "OOMKilled":
        return Result(
            ConfigurationError.exit_code, f"{name} ran out of memory{_limit(job)}: submit it with --memory"
        )
    if reason == "DeadlineExceeded":
        return Result(
            code or Stopped.exit_code, f"{name} was stopped after its activeDeadlineSeconds: {message}"
        )
    if code == 0:
        return Result(TransientError.exit_code, f"{name} failed: {_pod_reason(ended) or message or reason}")
    return Result(code, f"{name} failed with exit code {code}{_tries(pods)}")


def stopped_pod(pod: Json) -> str:
    """Return what happened to a pod that failed, in a few words."""
    terminated = stage_state(pod).get("terminated") or {}
    code = terminated.get("exitCode")
    disruption = condition(pod, "DisruptionTarget")
    if disruption and disruption["status"] == "True":
        return f"was taken away ({disruption.get('reason', 'disruption')})"
    if terminated.get("reason") == "OOMKilled":
        return "ran out of memory"
    return f"ended with exit code {code}" if code is not None else (_pod_reason(pod) or "failed")


def _last_ended(pods: Sequence[Json]) -> Json | None:
    ended = [
        pod
        for pod in pods
        if pod.get("status", {}).get("phase") == "Failed" or stage_state(pod).get("terminated")
    ]
    failed = [pod for pod in ended if (stage_state(pod).get("terminated") or {}).get("exitCode") != 0]
    return max(failed or ended, key=_ended_at, default=None)


def _ended_at(pod: Json) -> str:
    terminated = stage_state(pod).get("terminated") or {}
    return str(terminated.get("finishedAt") or pod["metadata"].get("creationTimestamp", ""))


def _pod_reason(pod: Json) -> str:
    status = pod.get("status", {})
    return " ".join(f"{status.get('reason', '')} {status.get('message', '')}".split())


def _limit(job: Json) -> str:
    for container in job["spec"]["template"]["spec"]["containers"]:
        if limit := container.get("resources", {}).get("limits", {}).get("memory"):
            return f" ({limit})"
    return ""


def _tries(pods: Sequence[Json]) -> str:
    return f" after {len(pods)} tries" if len(pods) > 1 else ""

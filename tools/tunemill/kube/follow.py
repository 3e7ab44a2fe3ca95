"""Following a Job: its events, its log, why it waits, and how it ends.

Three watches and a thread for each pod's log feed one queue, which the main thread empties, so a signal is
noticed at once. Nothing here changes anything in the cluster.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, Queue
from typing import Any

from tunemill.errors import ConfigurationError, Stopped, TunemillError
from tunemill.kube.api import Api, Json, NotFound, Refused
from tunemill.kube.explain import Seen, Why, explain, gpus_of, largest_gpu_node
from tunemill.kube.logs import REFERENCE, Ended, Line, PodLog, started
from tunemill.kube.outcome import Result, finished, output_of, result_of, stopped_pod
from tunemill.kube.watching import Change, Failed, Watch

TICK = 0.5  # seconds between looks at what changes without an event
HOPELESS_SECONDS = (
    20.0  # a reason that only a person can remove has to last as long before it ends the following
)
LOG_SECONDS = 60.0  # for what is left of a log once its Job has ended
POD_OF = "batch.kubernetes.io/controller-uid"
# Events that tell a person how far it is; those that say why it is not are put into words by explain.py.
TELLING = {"Scheduled", "Pulling", "Started", "Preempted", "Evicted", "Suspended", "Resumed", "NodeNotReady"}
TELLING |= {"TaintManagerEviction", "DeadlineExceeded", "Admitted"}

log = logging.getLogger("tunemill")


@dataclass(frozen=True)
class Followed:
    """How following a Job ended."""

    result: Result
    reference: str
    """Of the output; its name alone where the log no longer tells."""


@dataclass
class _State:
    job: Json
    pods: dict[str, Json] = field(default_factory=dict)
    events: list[Json] = field(default_factory=list)
    reading: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    told: set[tuple[str, str]] = field(default_factory=set)
    early: dict[str, list[Json]] = field(default_factory=dict)
    """Events of pods that have not been seen yet: each watch has its own pace."""
    reference: str = ""
    gone: bool = False
    said: set[str] = field(default_factory=set)
    hopeless_since: float | None = None
    ended: float | None = None


def follow(api: Api, name: str, resource: str = "nvidia.com/gpu", logs: bool = True) -> Followed:
    """Stay with a Job until it has ended, and say on the log what happens.

    Raises:
        ConfigurationError: it cannot start before somebody puts something right.
        TunemillError: the cluster cannot be read any more.
    """
    following = _Following(api, name, resource, logs)
    try:
        return following.run()
    finally:
        following.stop()


def say(message: str, *values: object) -> None:
    """Log one line about the Job."""
    log.info(message, *values)


class _Following:
    def __init__(self, api: Api, name: str, resource: str, logs: bool) -> None:
        self._api, self._name, self._resource, self._logs = api, name, resource, logs
        self._found: Queue[Any] = Queue()
        self._state = _State(api.get(f"{api.jobs}/{name}"))
        self._uid: str = self._state.job["metadata"]["uid"]
        self._watches = [
            Watch(api, "job", api.jobs, {"fieldSelector": f"metadata.name={name}"}, self._found),
            Watch(api, "pod", api.pods, {"labelSelector": f"{POD_OF}={self._uid}"}, self._found),
            Watch(api, "event", api.events, {}, self._found),
        ]
        self._largest: Callable[[], tuple[int, str] | None] = _once(self._list_nodes)

    def run(self) -> Followed:
        for watch in self._watches:
            watch.start()
        while True:
            self._take_all()
            state = self._state
            if state.gone:
                why = f"{self._name} was deleted before it had ended"
                return Followed(Result(Stopped.exit_code, why), output_of(state.job))
            if self._logs:
                self._read_logs()
            if finished(state.job):
                if self._all_read():
                    return self._end()
            else:
                self._say_why()

    def stop(self) -> None:
        for watch in self._watches:
            watch.stop()

    def _take_all(self) -> None:
        with suppress(Empty):
            change = self._found.get(timeout=TICK)
            while True:
                self._take(change)
                change = self._found.get_nowait()

    def _take(self, change: Change | Failed | Line | Ended) -> None:
        if isinstance(change, Line):
            self._show(change)
        elif isinstance(change, Ended):
            self._state.read.add(change.pod)
        elif isinstance(change, Failed):
            self._lose(change)
        elif change.kind == "job" and change.thing["metadata"]["uid"] == self._uid:
            self._state.job, self._state.gone = change.thing, change.gone
        elif change.kind == "pod":
            self._take_pod(change)
        elif change.kind == "event":
            self._take_event(change.thing)

    def _take_pod(self, change: Change) -> None:
        pod, name = change.thing, change.thing["metadata"]["name"]
        before = self._state.pods.get(name)
        if change.gone and started(pod) != "ended":
            self._state.pods.pop(name, None)
            return
        self._state.pods[name] = pod  # one that has ended and is gone still tells how
        was_failed = before is not None and before.get("status", {}).get("phase") == "Failed"
        if pod.get("status", {}).get("phase") == "Failed" and not was_failed:
            say("%s %s", name, stopped_pod(pod))
        for event in self._state.early.pop(pod["metadata"]["uid"], []):
            self._take_event(event)

    def _take_event(self, event: Json) -> None:
        mine = {self._uid, *(pod["metadata"]["uid"] for pod in self._state.pods.values())}
        involved = event["involvedObject"]
        if involved.get("uid") not in mine:
            if str(involved.get("name", "")).startswith(f"{self._name}-"):
                self._state.early.setdefault(str(involved.get("uid")), []).append(event)
            return
        self._state.events.append(event)
        message = " ".join(str(event.get("message", "")).split())
        seen = (str(event.get("reason")), message)
        if event.get("reason") in TELLING and seen not in self._state.told:
            self._state.told.add(seen)
            say("%s: %s", event["reason"], message)

    def _lose(self, lost: Failed) -> None:
        """Go on without events and log; without the Job itself there is nothing to follow."""
        if lost.kind not in ("event", "log"):
            raise lost.error
        say("going on without its %ss: %s", lost.kind, lost.error)

    def _show(self, line: Line) -> None:
        if REFERENCE.fullmatch(line.text):
            self._state.reference = line.text
            return
        many = self._state.job["spec"].get("completionMode") == "Indexed"
        labels = self._state.pods.get(line.pod, {}).get("metadata", {}).get("labels") or {}
        index = labels.get("batch.kubernetes.io/job-completion-index")
        say("%s%s", f"[{index}] " if many and index else "", line.text)

    def _read_logs(self) -> None:
        for name, pod in self._state.pods.items():
            if name not in self._state.reading and started(pod) != "waiting":
                self._state.reading.add(name)
                PodLog(self._api, pod, self._found).start()

    def _all_read(self) -> bool:
        """Say whether all that the pods wrote is here; the first time, read the pods once more."""
        state = self._state
        if state.ended is None:
            state.ended = time.monotonic()
            listed = self._api.get(self._api.pods, labelSelector=f"{POD_OF}={self._uid}")
            for pod in listed["items"]:
                self._take_pod(Change("pod", pod))
            return not self._logs or not state.pods
        return not self._logs or state.read >= state.reading or time.monotonic() - state.ended > LOG_SECONDS

    def _end(self) -> Followed:
        result = result_of(self._state.job, list(self._state.pods.values()))
        return Followed(result, self._state.reference or output_of(self._state.job))

    def _say_why(self) -> None:
        state = self._state
        why = None if any(started(pod) == "running" for pod in state.pods.values()) else self._explain()
        if why is None:
            state.hopeless_since = None
            return
        if why.line not in state.said:  # an image that is tried again and again alternates between two
            state.said.add(why.line)
            say("waiting: %s", why.line)
        if not why.hopeless:
            return
        now = time.monotonic()
        state.hopeless_since = state.hopeless_since or now
        if now - state.hopeless_since > HOPELESS_SECONDS:
            raise ConfigurationError(
                f"{why.line}; it starts once that is put right, or: tunemill cancel {self._name}"
            )

    def _explain(self) -> Why | None:
        return look(
            self._api,
            self._state.job,
            list(self._state.pods.values()),
            self._state.events,
            self._resource,
            self._largest,
        )

    def _list_nodes(self) -> tuple[int, str] | None:
        return largest(self._api, self._resource)


def look(
    api: Api,
    job: Json,
    pods: list[Json],
    events: list[Json],
    resource: str,
    nodes: Callable[[], tuple[int, str] | None],
) -> Why | None:
    """Return why a Job waits, asking for Kueue's workload and the nodes only where they matter."""
    workload = _workload(api, job) if job["spec"].get("suspend") else None
    asks = gpus_of(job["spec"]["template"], resource) > 0
    unplaced = any(started(pod) == "waiting" for pod in pods)
    return explain(Seen(job, pods, events, workload, nodes() if asks and unplaced else None, resource))


def largest(api: Api, resource: str) -> tuple[int, str] | None:
    """Return the most GPUs of one node and its name, or None where nodes cannot be listed."""
    try:
        return largest_gpu_node(api.get("/api/v1/nodes", limit="5000")["items"], resource)
    except TunemillError:
        return None  # only administrators may list nodes in many clusters; the scheduler's words then suffice


def _workload(api: Api, job: Json) -> Json | None:
    try:
        version = kueue_version(api)
        if version is None:
            return None
        selector = f"kueue.x-k8s.io/job-uid={job['metadata']['uid']}"
        items = api.get(api.path(version, "workloads"), labelSelector=selector)["items"]
    except TunemillError:
        return None  # without the right to read workloads there is still the queue's name
    return items[0] if items else None


def kueue_version(api: Api) -> str | None:
    """Return Kueue's preferred API version, such as ``kueue.x-k8s.io/v1beta1``; None without Kueue."""
    try:
        return str(api.get("/apis/kueue.x-k8s.io")["preferredVersion"]["groupVersion"])
    except (NotFound, Refused):
        return None


def _once(ask: Callable[[], tuple[int, str] | None]) -> Callable[[], tuple[int, str] | None]:
    answers: list[tuple[int, str] | None] = []
    lock = threading.Lock()

    def answer() -> tuple[int, str] | None:
        with lock:
            if not answers:
                answers.append(ask())
        return answers[0]

    return answer

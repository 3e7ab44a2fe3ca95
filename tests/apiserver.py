"""An HTTP server that answers as the Kubernetes API server does, as far as the client asks.

Resource versions, watches with bookmarks, 410, optimistic conflicts, dry runs, strict field validation by the
published schemas, Status objects for errors, logs that go on from a whole second. What controllers and
kubelets do is told by the test, by ``Cluster.start_pod`` and its siblings, or done by
``tests/images/kubelet.py``.
"""

from __future__ import annotations

import copy
import json
import re
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate

Json = dict[str, Any]
VERSION = "1.36"
TOKEN = "good"
KINDS = {
    "jobs": ("batch/v1", "Job"),
    "pods": ("v1", "Pod"),
    "events": ("v1", "Event"),
    "nodes": ("v1", "Node"),
    "namespaces": ("v1", "Namespace"),
    "secrets": ("v1", "Secret"),
    "configmaps": ("v1", "ConfigMap"),
    "serviceaccounts": ("v1", "ServiceAccount"),
    "services": ("v1", "Service"),
    "persistentvolumeclaims": ("v1", "PersistentVolumeClaim"),
    "networkpolicies": ("networking.k8s.io/v1", "NetworkPolicy"),
    "roles": ("rbac.authorization.k8s.io/v1", "Role"),
    "rolebindings": ("rbac.authorization.k8s.io/v1", "RoleBinding"),
    "storageclasses": ("storage.k8s.io/v1", "StorageClass"),
    "localqueues": ("kueue.x-k8s.io/v1beta1", "LocalQueue"),
    "workloads": ("kueue.x-k8s.io/v1beta1", "Workload"),
}
PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+)(?=/))?/(?P<plural>[a-z]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>[a-z]+))?$"
)
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")


@dataclass
class Fault:
    """An answer that is not the usual one, for the first ``times`` requests that match."""

    method: str
    part: str
    """What the path and query contain."""
    times: int = 1
    status: int = 0
    body: Json | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    """Bytes of a stream before the connection is dropped."""


class Cluster:
    """The state behind the server."""

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.objects: dict[tuple[str, str, str], Json] = {}
        self.history: list[tuple[int, str, str, Json]] = []
        """Version, plural, type of change, object."""
        self.revision = 100
        self.oldest = 0
        """Changes up to here are forgotten: watching from before it is 410."""
        self.denied: set[tuple[str, str]] = set()
        self.logs: dict[str, list[tuple[str, str]]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.kueue = False
        self.slow_deletion = 0.3
        self.on_create: Callable[[Json], None] = lambda _: None
        for name in ("lab", "default"):
            self.put("namespaces", {"metadata": {"name": name, "labels": {}}})

    def put(self, plural: str, thing: Json, kind: str | None = None) -> Json:
        """Store an object as it is, as a controller would."""
        with self.lock:
            metadata = thing["metadata"]
            namespace = (
                ""
                if plural in ("nodes", "namespaces", "storageclasses")
                else metadata.get("namespace", "lab")
            )
            if namespace:
                metadata["namespace"] = namespace
            thing.setdefault("apiVersion", KINDS[plural][0])
            thing.setdefault("kind", KINDS[plural][1])
            key = (plural, namespace, metadata["name"])
            change = kind or ("MODIFIED" if key in self.objects else "ADDED")
            self.revision += 1
            metadata["resourceVersion"] = str(self.revision)
            metadata.setdefault("uid", str(uuid.uuid4()))
            metadata.setdefault("creationTimestamp", now())
            self.objects[key] = thing
            self.history.append((self.revision, plural, change, copy.deepcopy(thing)))
            self.lock.notify_all()
            return thing

    def remove(self, plural: str, name: str, namespace: str = "lab") -> None:
        with self.lock:
            thing = self.objects.pop((plural, namespace, name), None)
            if thing is None:
                return
            self.revision += 1
            thing["metadata"]["resourceVersion"] = str(self.revision)
            self.history.append((self.revision, plural, "DELETED", copy.deepcopy(thing)))
            self.lock.notify_all()

    def change(self, plural: str, name: str, update: Callable[[Json], None]) -> Json:
        with self.lock:
            thing = copy.deepcopy(self.objects[(plural, "lab", name)])
            update(thing)
            return self.put(plural, thing)

    def get(self, plural: str, name: str, namespace: str = "lab") -> Json | None:
        with self.lock:
            return copy.deepcopy(self.objects.get((plural, namespace, name)))

    def names(self, plural: str) -> list[str]:
        with self.lock:
            return [name for kind, _, name in self.objects if kind == plural]

    def forget(self) -> None:
        """Compact: from now on, watching from an earlier version is 410."""
        with self.lock:
            self.oldest = self.revision

    # What controllers and kubelets do.

    def start_pod(
        self, job: Json, suffix: str = "abcde", state: Json | None = None, index: int | None = None
    ) -> str:
        """Create a pod of a Job; its stage runs unless ``state`` says otherwise."""
        name = f"{job['metadata']['name']}-{suffix}"
        template = copy.deepcopy(job["spec"]["template"])
        status = {"phase": "Pending" if state and "waiting" in state else "Running", "conditions": []}
        image = template["spec"]["containers"][0]["image"]
        status["containerStatuses"] = [
            {"name": "stage", "image": image, "imageID": "", "ready": False, "restartCount": 0}
            | {"state": state or {"running": {"startedAt": now()}}}
        ]
        labels = template["metadata"]["labels"]
        if index is not None:
            labels["batch.kubernetes.io/job-completion-index"] = str(index)
        metadata = {"name": name, "labels": labels}
        self.put("pods", {"metadata": metadata, "spec": template["spec"], "status": status})
        self.change("jobs", job["metadata"]["name"], lambda job: job.update(status={"active": 1, "ready": 1}))
        return name

    def pending_pod(self, job: Json, conditions: list[Json], suffix: str = "abcde") -> str:
        """Create a pod that no node has taken."""
        name = self.start_pod(job, suffix, {"waiting": {}})
        self.change(
            "pods", name, lambda pod: pod.update(status={"phase": "Pending", "conditions": conditions})
        )
        return name

    def write(self, pod: str, *lines: str, stamp: str | None = None) -> None:
        with self.lock:
            for line in lines:
                self.logs.setdefault(pod, []).append((stamp or now(nanoseconds=True), line))
            self.lock.notify_all()

    def end_pod(
        self, name: str, code: int, reason: str | None = None, conditions: list[Json] | None = None
    ) -> None:
        ended = {
            "exitCode": code,
            "reason": reason or ("Completed" if code == 0 else "Error"),
            "finishedAt": now(),
        }

        def update(pod: Json) -> None:
            pod["status"]["phase"] = "Succeeded" if code == 0 else "Failed"
            pod["status"]["conditions"] = conditions or []
            pod["status"]["containerStatuses"][0]["state"] = {"terminated": ended}

        self.change("pods", name, update)

    def end_job(
        self, name: str, kind: str, reason: str = "", message: str = "", announced: bool = True
    ) -> None:
        """As since Kubernetes 1.31: first the condition that announces it, then the one that ends it."""
        first = {"Complete": "SuccessCriteriaMet", "Failed": "FailureTarget"}[kind]
        common = {"status": "True", "reason": reason, "message": message}
        if announced:
            self.change(
                "jobs", name, lambda job: job.update(status={"conditions": [{"type": first, **common}]})
            )
            time.sleep(0.2)
        both = [{"type": first, **common}, {"type": kind, **common}]
        self.change("jobs", name, lambda job: job.update(status={"conditions": both}))

    def event(self, thing: Json, reason: str, message: str, kind: str = "Warning") -> None:
        involved = {"kind": thing["kind"], "name": thing["metadata"]["name"], "uid": thing["metadata"]["uid"]}
        self.put(
            "events",
            {
                "metadata": {"name": f"{thing['metadata']['name']}.{uuid.uuid4().hex[:12]}"},
                "involvedObject": involved,
                "reason": reason,
                "message": message,
                "type": kind,
                "lastTimestamp": now(),
            },
        )


def now(nanoseconds: bool = False) -> str:
    moment = datetime.now(UTC)
    fraction = f".{time.time_ns() % 10**9:09d}" if nanoseconds else ""
    return f"{moment:%Y-%m-%dT%H:%M:%S}{fraction}Z"


def status(code: int, reason: str, message: str, **details: Any) -> Json:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "details": details,
        "code": code,
    }


class Refusal(Exception):
    def __init__(self, code: int, reason: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.body = status(code, reason, message, **details)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_DELETE(self) -> None:
        self._answer(self._delete)

    def _answer(self, act: Callable[[], None]) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body: Json = json.loads(self.rfile.read(length)) if length else {}
        parts = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.route = PATH.fullmatch(parts.path)
        self.where = parts.path
        self.fault: Fault | None = None
        with self.cluster.lock:
            self.cluster.requests.append((self.command, self.path))
        try:
            if self._faulty():
                return
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refusal(401, "Unauthorized", "Unauthorized")
            act()
        except Refusal as refusal:
            self._send(refusal.code, refusal.body)
        except BrokenPipeError:
            pass

    def _faulty(self) -> bool:
        with self.cluster.lock:
            for fault in self.cluster.faults:
                if fault.times and fault.method == self.command and fault.part in self.path:
                    fault.times -= 1
                    self.fault = fault
                    break
        if self.fault is None or self.fault.cut_after is not None:
            return False
        if self.fault.status == 0:
            self.close_connection = True
            self.connection.close()
            return True
        code = self.fault.status
        self._send(code, self.fault.body or status(code, "", f"told to answer {code}"), self.fault.headers)
        return True

    def _send(self, code: int, body: Json, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _allow(self, verb: str, plural: str) -> None:
        if (verb, plural) not in self.cluster.denied:
            return
        assert self.route
        group, namespace = self.route["group"] or "", self.route["namespace"]
        kind = f"{plural}.{group}" if group else plural
        place = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
        raise Refusal(
            403,
            "Forbidden",
            f'{kind} is forbidden: User "ada" cannot {verb} resource "{plural}" '
            f'in API group "{group}" {place}',
            kind=plural,
        )

    def _get(self) -> None:
        if self.where == "/version":
            return self._send(200, {"major": "1", "minor": "36", "gitVersion": "v1.36.0"})
        if self.where == "/apis/kueue.x-k8s.io":
            if not self.cluster.kueue:
                raise Refusal(404, "NotFound", "the server could not find the requested resource")
            preferred = {"groupVersion": "kueue.x-k8s.io/v1beta1", "version": "v1beta1"}
            return self._send(200, {"kind": "APIGroup", "apiVersion": "v1", "preferredVersion": preferred})
        if self.route is None or self.route["plural"] not in KINDS:
            raise Refusal(404, "NotFound", "the server could not find the requested resource")
        plural, name, namespace = self.route["plural"], self.route["name"], self.route["namespace"] or ""
        if self.route["sub"] == "log":
            self._allow("get", "pods/log")
            return self._log(name)
        if name:
            self._allow("get", plural)
            thing = self.cluster.get(plural, name, namespace)
            if thing is None:
                raise missing(plural, self.route["group"], name)
            return self._send(200, thing)
        if self.query.get("watch") in ("true", "1"):
            self._allow("watch", plural)
            return self._watch(plural)
        self._allow("list", plural)
        return self._list(plural)

    def _chosen(self, thing: Json) -> bool:
        assert self.route
        if self.route["namespace"] and thing["metadata"].get("namespace") != self.route["namespace"]:
            return False
        labels = thing["metadata"].get("labels") or {}
        for word in filter(None, self.query.get("labelSelector", "").split(",")):
            key, _, value = word.partition("=")
            if labels.get(key) != value:
                return False
        for word in filter(None, self.query.get("fieldSelector", "").split(",")):
            key, _, value = word.partition("=")
            if key != "metadata.name":
                raise Refusal(400, "BadRequest", f'field label "{key}" not supported')
            if thing["metadata"]["name"] != value:
                return False
        return True

    def _list(self, plural: str) -> None:
        with self.cluster.lock:
            items = [
                copy.deepcopy(thing)
                for (kind, _, _), thing in self.cluster.objects.items()
                if kind == plural and self._chosen(thing)
            ]
            metadata = {"resourceVersion": str(self.cluster.revision)}
        start, limit = int(self.query.get("continue", 0)), int(self.query.get("limit", 0))
        page = items[start : start + limit] if limit else items
        if limit and start + limit < len(items):
            metadata["continue"] = str(start + limit)
        version, kind = KINDS[plural]
        for item in page:  # items of a list name no kind
            del item["kind"], item["apiVersion"]
        self._send(200, {"kind": f"{kind}List", "apiVersion": version, "metadata": metadata, "items": page})

    def _begin_stream(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.sent = 0

    def _chunk(self, data: bytes) -> None:
        """Send one chunk; at a fault's limit, part of it, and drop the connection."""
        limit = self.fault.cut_after if self.fault else None
        if limit is not None and self.sent + len(data) > limit:
            part = data[: limit - self.sent]
            if part:
                self.wfile.write(f"{len(data):x}\r\n".encode() + part)
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            raise BrokenPipeError
        self.sent += len(data)
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _watch(self, plural: str) -> None:
        since = int(self.query["resourceVersion"])
        deadline = time.monotonic() + min(float(self.query.get("timeoutSeconds", 60)), 20)
        self._begin_stream("application/json")
        if since < self.cluster.oldest:
            gone = status(410, "Expired", f"too old resource version: {since} ({self.cluster.oldest})")
            self._chunk(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
            self._chunk(b"")
            return
        while time.monotonic() < deadline:
            with self.cluster.lock:
                fresh = [change for change in self.cluster.history if change[0] > since]
                if not fresh:
                    self.cluster.lock.wait(0.2)
                    continue
                since = fresh[-1][0]
            for _, kind, change, thing in fresh:
                if kind == plural and self._chosen(thing):
                    self._chunk(json.dumps({"type": change, "object": thing}).encode() + b"\n")
            version, kind = KINDS[plural]
            if self.query.get("allowWatchBookmarks") == "true":
                mark = {"kind": kind, "apiVersion": version, "metadata": {"resourceVersion": str(since)}}
                self._chunk(json.dumps({"type": "BOOKMARK", "object": mark}).encode() + b"\n")
        self._chunk(b"")

    def _log(self, name: str) -> None:
        pod = self.cluster.get("pods", name)
        if pod is None:
            raise missing("pods", None, name)
        statuses = pod["status"].get("containerStatuses") or [
            {"state": {"waiting": {"reason": "ContainerCreating"}}}
        ]
        if "waiting" in statuses[0]["state"]:
            reason = statuses[0]["state"]["waiting"].get("reason", "ContainerCreating")
            raise Refusal(
                400,
                "BadRequest",
                f'container "stage" in pod "{name}" is waiting to start: {reason}',
            )
        since, sent = self.query.get("sinceTime", ""), 0
        if since and not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", since):
            raise Refusal(400, "BadRequest", f"sinceTime: {since}")
        stamps = self.query.get("timestamps") == "true"
        self._begin_stream("text/plain")
        while True:
            with self.cluster.lock:
                lines = [line for line in self.cluster.logs.get(name, []) if line[0][:19] >= since[:19]]
                running = (
                    "running"
                    in (self.cluster.get("pods", name) or pod)["status"]["containerStatuses"][0]["state"]
                )
                fresh, sent = lines[sent:], len(lines)
                if not fresh and running and self.query.get("follow") == "true":
                    self.cluster.lock.wait(0.2)
                    continue
            for stamp, text in fresh:
                self._chunk((f"{stamp} {text}\n" if stamps else f"{text}\n").encode())
            if not (running and self.query.get("follow") == "true"):
                break
        self._chunk(b"")

    def _post(self) -> None:
        assert self.route
        plural, namespace = self.route["plural"], self.route["namespace"] or ""
        if plural == "selfsubjectaccessreviews":
            return self._review()
        self._allow("create", plural)
        if namespace and self.cluster.get("namespaces", namespace, "") is None:
            raise missing("namespaces", None, namespace)
        self._check(plural)
        thing = copy.deepcopy(self.body)
        metadata = thing["metadata"]
        if "generateName" in metadata and "name" not in metadata:
            metadata["name"] = metadata["generateName"] + uuid.uuid4().hex[:5]
        metadata["namespace"] = namespace
        if self.cluster.get(plural, metadata["name"], namespace):
            kind = f"{plural}.{self.route['group']}" if self.route["group"] else plural
            raise Refusal(409, "AlreadyExists", f'{kind} "{metadata["name"]}" already exists')
        if plural == "jobs":
            label_job(thing)
        if self.query.get("dryRun") == "All":
            return self._send(201, thing)
        made = self.cluster.put(plural, thing)
        if plural == "jobs":
            self.cluster.on_create(copy.deepcopy(made))
        return self._send(201, made)

    def _check(self, plural: str) -> None:
        """Decode strictly and validate, as create does."""
        version, kind = KINDS[plural]
        if (self.body.get("apiVersion"), self.body.get("kind")) != (version, kind):
            raise Refusal(400, "BadRequest", f"the object is no {version} {kind}: {self.body.get('kind')}")
        assert self.query.get("fieldManager") == "tunemill"
        assert self.query.get("fieldValidation") == "Strict"
        try:
            kubernetes_validate.validate(self.body, VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            message = f'{kind} in version "v1" cannot be handled as a {kind}: strict decoding error: '
            raise Refusal(400, "BadRequest", message + error.message) from error
        name = self.body["metadata"].get("name", self.body["metadata"].get("generateName", ""))
        if not NAME.fullmatch(name) or (plural == "jobs" and len(name) > 63):
            raise Refusal(
                422, "Invalid", f'{kind}.{version} "{name}" is invalid: metadata.name: Invalid value'
            )
        for label in (self.body["metadata"].get("labels") or {}).values():
            if not re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?", label):
                raise Refusal(422, "Invalid", f'{kind} "{name}" is invalid: metadata.labels: "{label}"')

    def _review(self) -> None:
        asked = self.body["spec"]["resourceAttributes"]
        plural = asked["resource"] + (f"/{asked['subresource']}" if "subresource" in asked else "")
        allowed = (asked["verb"], plural) not in self.cluster.denied
        self._send(201, {**self.body, "status": {"allowed": allowed}})

    def _delete(self) -> None:
        assert self.route
        plural, name, namespace = self.route["plural"], self.route["name"], self.route["namespace"] or ""
        self._allow("delete", plural)
        thing = self.cluster.get(plural, name, namespace)
        if thing is None:
            raise missing(plural, self.route["group"], name)
        assert self.body.get("kind") == "DeleteOptions"
        wanted = self.body.get("preconditions", {}).get("uid")
        if wanted and wanted != thing["metadata"]["uid"]:
            raise Refusal(409, "Conflict", f"the UID in the precondition ({wanted}) does not match")
        if self.body.get("propagationPolicy") == "Foreground":
            thing["metadata"] |= {"deletionTimestamp": now(), "finalizers": ["foregroundDeletion"]}
            self.cluster.put(plural, thing)
            threading.Timer(
                self.cluster.slow_deletion, self.cluster.remove, (plural, name, namespace)
            ).start()
            return self._send(200, thing)
        self.cluster.remove(plural, name, namespace)
        return self._send(200, {"kind": "Status", "apiVersion": "v1", "status": "Success"})


def label_job(job: Json) -> None:
    """Select the Job's pods as the API server does."""
    uid = job["metadata"]["uid"] = str(uuid.uuid4())
    name = job["metadata"]["name"]
    labels = {"controller-uid": uid, "job-name": name}
    labels |= {f"batch.kubernetes.io/{key}": value for key, value in labels.items()}
    job["spec"]["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}
    template = job["spec"]["template"].setdefault("metadata", {})
    template["labels"] = {**template.get("labels", {}), **labels}
    job["status"] = {}


def missing(plural: str, group: str | None, name: str) -> Refusal:
    kind = f"{plural}.{group}" if group else plural
    return Refusal(404, "NotFound", f'{kind} "{name}" not found', name=name, kind=plural)


def serve(cluster: Cluster) -> ThreadingHTTPServer:
    """Start a server on a free port in a thread."""
    handler = type("ClusterHandler", (Handler,), {"cluster": cluster})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server

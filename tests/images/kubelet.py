"""The Job controller and the kubelet, as far as the project's Jobs need them, with Docker for the containers.

What a pod's template says is what its container gets: user, groups, capabilities, read-only root, limits,
volumes, environment, arguments, names and its own address. A field that is not translated here and would
matter ends the test. Not done: node selection, storage limits, network policies; the pods' network has no way
out instead.
"""

from __future__ import annotations

import base64
import ipaddress
import itertools
import os
import re
import shutil
import subprocess
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apiserver import Cluster
from tunemill.kube.resources import parse_quantity

Json = dict[str, Any]
NAMESPACE = "lab"
DOMAIN = f"{NAMESPACE}.svc.cluster.local"
REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_]*)\)")
FIELD = re.compile(r"metadata\.labels\['(.+)'\]")
POD_KEYS = {
    *("automountServiceAccountToken", "containers", "enableServiceLinks", "restartPolicy", "securityContext"),
    *("serviceAccountName", "shareProcessNamespace", "subdomain", "terminationGracePeriodSeconds"),
    *("tolerations", "topologySpreadConstraints", "volumes"),
}
CONTAINER_KEYS = {
    *("args", "command", "env", "envFrom", "image", "imagePullPolicy", "name", "ports", "resources"),
    *("securityContext", "volumeMounts"),
}


@dataclass
class Node:
    """Runs the pods of every Job that a cluster is given."""

    cluster: Cluster
    network: str
    addresses: Iterator[ipaddress.IPv4Address]
    folder: Path
    """Of the pods' volumes."""
    containers: dict[str, str] = field(default_factory=dict)
    """Pod to container."""
    commands: dict[str, list[str]] = field(default_factory=dict)
    """Pod to what was run for it."""
    disrupted: set[str] = field(default_factory=set)

    def start(self) -> None:
        """Take every Job that is created from now on."""
        self.cluster.on_create = lambda job: threading.Thread(
            target=self._control, args=(job,), daemon=True
        ).start()

    def preempt(self, pod: str) -> None:
        """Take a pod away as the scheduler does: marked, SIGTERM, its grace, SIGKILL."""
        self.disrupted.add(pod)
        found = self.cluster.get("pods", pod)
        assert found
        grace = found["spec"].get("terminationGracePeriodSeconds", 30)
        subprocess.run(["docker", "stop", "--time", str(grace), self.containers[pod]], check=True)

    def kill(self, pod: str) -> None:
        """End a pod as the kernel does when memory is short."""
        subprocess.run(["docker", "kill", self.containers[pod]], check=True, capture_output=True)

    # The Job controller.

    def _control(self, job: Json) -> None:
        """Run a Job's pods until each index has succeeded, or the Job has failed."""
        count = job["spec"].get("completions", 1)
        failed: list[tuple[str, str]] = []
        indexes = range(count) if job["spec"].get("completionMode") == "Indexed" else [None]
        threads = [threading.Thread(target=self._complete, args=(job, index, failed)) for index in indexes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        name = job["metadata"]["name"]
        if self.cluster.get("jobs", name) is None:
            return
        if failed:
            self.cluster.end_job(name, "Failed", *failed[0])
        else:
            self.cluster.end_job(name, "Complete")

    def _complete(self, job: Json, index: int | None, failed: list[tuple[str, str]]) -> None:
        """Run pods for one index, one after the other, as podFailurePolicy and backoffLimit say."""
        spec, retries = job["spec"], 0
        while not failed:
            pod, code = self._run(job, index)
            if code == 0 or self.cluster.get("jobs", job["metadata"]["name"]) is None:
                return
            action = self._action(spec.get("podFailurePolicy", {}).get("rules", []), pod, code)
            if action == "FailJob":
                failed.append(("PodFailurePolicy", f"Container stage for pod {NAMESPACE}/{pod} failed"))
            retries += action == "Count"
            if retries > spec.get("backoffLimitPerIndex", spec.get("backoffLimit", 6)):
                failed.append(("BackoffLimitExceeded", "Job has reached the specified backoff limit"))

    def _action(self, rules: list[Json], pod: str, code: int) -> str:
        for rule in rules:
            exits = rule.get("onExitCodes")
            if exits is None and pod in self.disrupted:
                return str(rule["action"])
            if exits and (code in exits["values"]) == (exits["operator"] == "In"):
                return str(rule["action"])
        return "Count"

    # The kubelet.

    def _run(self, job: Json, index: int | None) -> tuple[str, int]:
        """Run one pod to its end; return its name and exit code."""
        suffix = "-".join(filter(None, [None if index is None else str(index), uuid.uuid4().hex[:5]]))
        pod = self.cluster.start_pod(job, suffix, index=index)
        found = self.cluster.get("pods", pod)
        assert found
        container = f"{self.network}-{suffix}-{uuid.uuid4().hex[:6]}"
        command = self._command(found, index, container)
        self.containers[pod], self.commands[pod] = container, command
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
            gone = threading.Event()
            threading.Thread(target=self._stop_with_job, args=(job, container, gone), daemon=True).start()
            assert run.stdout
            for line in run.stdout:
                self.cluster.write(pod, line.rstrip("\n"))
        gone.set()
        marks = [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]
        self.cluster.end_pod(pod, run.returncode, conditions=marks if pod in self.disrupted else None)
        shutil.rmtree(self.folder / pod, ignore_errors=True)
        return pod, run.returncode

    def _stop_with_job(self, job: Json, container: str, gone: threading.Event) -> None:
        """Stop the container when its Job is deleted."""
        while not gone.wait(0.2):
            if self.cluster.get("jobs", job["metadata"]["name"]) is None:
                grace = job["spec"]["template"]["spec"].get("terminationGracePeriodSeconds", 30)
                subprocess.run(["docker", "stop", "--time", str(grace), container], capture_output=True)
                return

    def _command(self, pod: Json, index: int | None, name: str) -> list[str]:
        """Return the ``docker run`` that does what a pod's specification says."""
        spec, address = pod["spec"], str(next(self.addresses))
        (container,) = spec["containers"]
        assert spec.keys() <= POD_KEYS, spec.keys() - POD_KEYS
        assert container.keys() <= CONTAINER_KEYS, container.keys() - CONTAINER_KEYS
        host = pod["metadata"]["labels"]["job-name"] + ("" if index is None else f"-{index}")
        words = ["docker", "run", "--rm", "--pull", "never", "--name", name, "--network", self.network]
        words += ["--ip", address, "--hostname", host]
        if "subdomain" in spec:
            words += ["--domainname", f"{spec['subdomain']}.{DOMAIN}"]
            words += ["--network-alias", f"{host}.{spec['subdomain']}.{DOMAIN}"]
        words += [*confinement(spec, container), *limits(container)]
        environment = self._environment(pod, container, address, index)
        for key, value in environment.items():
            words += ["--env", f"{key}={value}"]
        words += self._mounts(pod, container)
        entry = [expand(word, environment) for word in container.get("command") or []]
        if entry:
            words += ["--entrypoint", entry[0]]
        digest = container["image"].partition("@")[2]
        return [
            *words,
            digest,
            *entry[1:],
            *(expand(word, environment) for word in container.get("args") or []),
        ]

    def _environment(self, pod: Json, container: Json, address: str, index: int | None) -> dict[str, str]:
        values: dict[str, str] = {}
        for source in container.get("envFrom") or []:
            found = self.cluster.get("configmaps", source["configMapRef"]["name"])
            assert found
            values |= found["data"]
        for entry in container.get("env") or []:
            given = entry["valueFrom"]["fieldRef"] if "valueFrom" in entry else None
            text = field_of(pod, given["fieldPath"], address) if given else entry.get("value", "")
            values[entry["name"]] = expand(text, values)
        return values if index is None else values | {"JOB_COMPLETION_INDEX": str(index)}

    def _mounts(self, pod: Json, container: Json) -> list[str]:
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes") or []}
        words: list[str] = []
        for mount in container.get("volumeMounts") or []:
            assert mount.keys() <= {"name", "mountPath", "readOnly"}, mount
            made = self._volume(volumes[mount["name"]], pod, mount["mountPath"])
            if made is not None:
                words += ["--mount", made + (",readonly" if mount.get("readOnly") else "")]
        return words

    def _volume(self, volume: Json, pod: Json, path: str) -> str | None:
        """Return Docker's words for a volume; None for an optional one that is not there."""
        group = pod["spec"]["securityContext"]["fsGroup"]
        empty = volume.get("emptyDir")
        if empty is not None and empty.get("medium") == "Memory":
            size = parse_quantity(empty["sizeLimit"])
            return f"type=tmpfs,destination={path},tmpfs-size={size},tmpfs-mode=1777"
        folder = self.folder / pod["metadata"]["name"] / volume["name"]
        if empty is None:
            files = self._files(volume)
            if files is None:
                return None
            write_files(folder, *files, group)
        else:
            folder.mkdir(parents=True)
            os.chown(folder, 0, group)
            folder.chmod(0o2777)
        return f"type=bind,source={folder},destination={path}"

    def _files(self, volume: Json) -> tuple[Mapping[str, bytes], int] | None:
        """Return names, contents and mode of a Secret's or a ConfigMap's files."""
        secret, config = volume.get("secret"), volume.get("configMap")
        source = secret or config
        assert source, f"a volume that is not translated: {volume}"
        kind, name = ("secrets", source["secretName"]) if secret else ("configmaps", source["name"])
        found = self.cluster.get(kind, name)
        if found is None and source.get("optional"):
            return None
        assert found, f"{kind} {name}"
        data = {
            key: base64.b64decode(value) if secret else value.encode() for key, value in found["data"].items()
        }
        items = {item["key"]: item["path"] for item in source.get("items", [])} or {key: key for key in data}
        return {path: data[key] for key, path in items.items()}, source.get("defaultMode", 0o644)


def addresses_of(network: ipaddress.IPv4Network) -> Iterator[ipaddress.IPv4Address]:
    """Yield addresses for pods: those behind the ones that Docker itself gives out first."""
    return itertools.islice(network.hosts(), 32, None)


def confinement(spec: Json, container: Json) -> list[str]:
    """Return what a pod's and its container's security contexts are in Docker's words."""
    whole, own = spec["securityContext"], container["securityContext"]
    assert whole.keys() <= {
        *("fsGroup", "fsGroupChangePolicy", "runAsGroup", "runAsNonRoot", "runAsUser", "seccompProfile"),
    }, whole
    assert whole["seccompProfile"] == {"type": "RuntimeDefault"}  # Docker's own, unless told otherwise
    words = ["--user", f"{whole['runAsUser']}:{whole['runAsGroup']}", "--group-add", str(whole["fsGroup"])]
    words += [word for name in own["capabilities"]["drop"] for word in ("--cap-drop", name)]
    words += ["--read-only"] if own["readOnlyRootFilesystem"] else []
    words += [] if own["allowPrivilegeEscalation"] else ["--security-opt", "no-new-privileges:true"]
    return words + (["--init"] if spec.get("shareProcessNamespace") else [])  # process 1 is the sandbox


def limits(container: Json) -> list[str]:
    """Return the limits of CPU and memory; Docker refuses more CPUs than there are."""
    amounts = container["resources"]["limits"]
    cpus = min(float(amounts["cpu"]), float(os.cpu_count() or 1))
    memory = str(parse_quantity(amounts["memory"]))
    return ["--cpus", str(cpus), "--memory", memory, "--memory-swap", memory]


def expand(text: str, values: Mapping[str, str]) -> str:
    """Fill in ``$(NAME)`` as the kubelet does: unknown names stay, and ``$$`` is a dollar."""
    return REFERENCE.sub(lambda found: "$" if found[0] == "$$" else values.get(found[1], found[0]), text)


def field_of(pod: Json, path: str, address: str) -> str:
    if label := FIELD.fullmatch(path):
        return str(pod["metadata"]["labels"][label[1]])
    return {
        "metadata.namespace": NAMESPACE,
        "status.podIP": address,
        "metadata.name": pod["metadata"]["name"],
    }[path]


def write_files(folder: Path, files: Mapping[str, bytes], mode: int, group: int) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        target = folder / name
        target.write_bytes(content)
        os.chown(target, 0, group)
        target.chmod(mode)
    os.chown(folder, 0, group)
    folder.chmod(0o755)

"""Every control of the Pod Security Standards' level "restricted", on every pod that the manifests make.

The table follows https://kubernetes.io/docs/concepts/security/pod-security-standards, the controls that
"restricted" takes over from "baseline" first. Each has mutants of a pod that conforms: one that a check does
not catch would show that it checks nothing.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from .conftest import CASES, Json, pods, render

SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
}
VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SELINUX = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
PROBES = ("livenessProbe", "readinessProbe", "startupProbe")
KINDS_OF_CONTAINER = ("containers", "initContainers", "ephemeralContainers")

Check = Callable[[Json], bool]
Change = Callable[[Json], None]


def containers(pod: Json) -> Iterator[Json]:
    for kind in KINDS_OF_CONTAINER:
        yield from pod["spec"].get(kind) or []


def context(part: Json) -> Json:
    return part.get("securityContext") or {}


def contexts(pod: Json) -> list[Json]:
    """The pod's own security context and those of its containers."""
    return [context(pod["spec"]), *(context(container) for container in containers(pod))]


def no_host_process(pod: Json) -> bool:
    return not any((part.get("windowsOptions") or {}).get("hostProcess") for part in contexts(pod))


def no_host_namespaces(pod: Json) -> bool:
    return not any(pod["spec"].get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))


def no_privileged_container(pod: Json) -> bool:
    return not any(context(container).get("privileged") for container in containers(pod))


def no_host_path(pod: Json) -> bool:
    return not any("hostPath" in volume for volume in pod["spec"].get("volumes") or [])


def no_host_port(pod: Json) -> bool:
    return not any(port.get("hostPort") for found in containers(pod) for port in found.get("ports") or [])


def no_host_in_probes_and_hooks(pod: Json) -> bool:
    handlers = [found.get(probe) or {} for found in containers(pod) for probe in PROBES]
    for found in containers(pod):
        handlers += [hook or {} for hook in (found.get("lifecycle") or {}).values()]
    actions = [handler.get(way) or {} for handler in handlers for way in ("httpGet", "tcpSocket")]
    return not any(action.get("host") for action in actions)


def app_armor(pod: Json) -> bool:
    profiles = [(part.get("appArmorProfile") or {}).get("type", "RuntimeDefault") for part in contexts(pod)]
    notes = (pod.get("metadata") or {}).get("annotations") or {}
    old = [
        value
        for name, value in notes.items()
        if name.startswith("container.apparmor.security.beta.kubernetes.io/")
    ]
    return set(profiles) <= {"RuntimeDefault", "Localhost"} and all(
        value == "runtime/default" or value.startswith("localhost/") for value in old
    )


def selinux(pod: Json) -> bool:
    options = [part.get("seLinuxOptions") or {} for part in contexts(pod)]
    return all(
        found.get("type", "") in SELINUX and not found.get("user") and not found.get("role")
        for found in options
    )


def proc_mount(pod: Json) -> bool:
    return all(context(found).get("procMount", "Default") == "Default" for found in containers(pod))


def sysctls(pod: Json) -> bool:
    return {found["name"] for found in context(pod["spec"]).get("sysctls") or []} <= SYSCTLS


def volume_types(pod: Json) -> bool:
    return all(
        len(kinds) == 1 and kinds <= VOLUMES
        for kinds in (set(volume) - {"name"} for volume in pod["spec"].get("volumes") or [])
    )


def no_privilege_escalation(pod: Json) -> bool:
    return all(context(found).get("allowPrivilegeEscalation") is False for found in containers(pod))


def running_as_non_root(pod: Json) -> bool:
    whole = context(pod["spec"]).get("runAsNonRoot")
    return all(context(found).get("runAsNonRoot", whole) is True for found in containers(pod))


def no_root_user(pod: Json) -> bool:
    return all(part.get("runAsUser") != 0 for part in contexts(pod))


def seccomp(pod: Json) -> bool:
    def kind(part: Json, otherwise: Any) -> Any:
        return (part.get("seccompProfile") or {}).get("type", otherwise)

    whole = kind(context(pod["spec"]), None)
    allowed = {"RuntimeDefault", "Localhost"}
    return whole in {None, *allowed} and all(
        kind(context(found), whole) in allowed for found in containers(pod)
    )


def capabilities(pod: Json) -> bool:
    found = [context(container).get("capabilities") or {} for container in containers(pod)]
    return all(
        "ALL" in (part.get("drop") or []) and set(part.get("add") or []) <= {"NET_BIND_SERVICE"}
        for part in found
    )


@dataclass(frozen=True)
class Mutant:
    """A change that breaks one control; ``part`` is the pod's spec, or one container of each kind in turn."""

    name: str
    part: str
    change: Change


def in_spec(name: str, **fields: Any) -> Mutant:
    return Mutant(name, "spec", lambda spec: spec.update(copy.deepcopy(fields)))


def in_context(name: str, **fields: Any) -> list[Mutant]:
    """The same in the pod's security context and in those of its containers."""
    return [*_context(name, "spec", fields), *in_containers(name, **fields)]


def in_containers(name: str, **fields: Any) -> list[Mutant]:
    return [mutant for kind in KINDS_OF_CONTAINER for mutant in _context(name, kind, fields)]


def on_containers(name: str, **fields: Any) -> list[Mutant]:
    return [
        Mutant(f"{name} of {kind}", kind, lambda container: container.update(copy.deepcopy(fields)))
        for kind in KINDS_OF_CONTAINER
    ]


def _context(name: str, part: str, fields: Json) -> list[Mutant]:
    def change(found: Json) -> None:
        found.setdefault("securityContext", {}).update(copy.deepcopy(fields))

    return [Mutant(f"{name} of {part}", part, change)]


def without(name: str, part: str) -> Mutant:
    return Mutant(f"no {name} of {part}", part, lambda found: found["securityContext"].pop(name))


def volume(kind: str, **fields: Any) -> Mutant:
    return Mutant(
        f"a {kind} volume", "spec", lambda spec: spec["volumes"].append({"name": "more", kind: fields})
    )


def seccomp_nowhere(pod_spec: Json) -> None:
    del pod_spec["securityContext"]["seccompProfile"]


def non_root_nowhere(pod_spec: Json) -> None:
    del pod_spec["securityContext"]["runAsNonRoot"]
    del pod_spec["containers"][0]["securityContext"]["runAsNonRoot"]


HOST = {"path": "/", "port": 80, "host": "169.254.169.254"}
CONTROLS: dict[str, tuple[Check, list[Mutant]]] = {
    "HostProcess": (
        no_host_process,
        in_context("a host process", windowsOptions={"hostProcess": True}),
    ),
    "Host Namespaces": (
        no_host_namespaces,
        [in_spec(name, **{name: True}) for name in ("hostNetwork", "hostPID", "hostIPC")],
    ),
    "Privileged Containers": (no_privileged_container, in_containers("privileged", privileged=True)),
    "HostPath Volumes": (no_host_path, [volume("hostPath", path="/var/lib")]),
    "Host Ports": (no_host_port, on_containers("a host port", ports=[{"containerPort": 80, "hostPort": 80}])),
    "Host Probes / Lifecycle Hooks": (
        no_host_in_probes_and_hooks,
        [
            *(mutant for probe in PROBES for mutant in on_containers(probe, **{probe: {"httpGet": HOST}})),
            *on_containers("a socket", livenessProbe={"tcpSocket": {"port": 80, "host": "10.0.0.1"}}),
            *on_containers("postStart", lifecycle={"postStart": {"httpGet": HOST}}),
            *on_containers("preStop", lifecycle={"preStop": {"tcpSocket": HOST}}),
        ],
    ),
    "AppArmor": (
        app_armor,
        [
            *in_context("unconfined", appArmorProfile={"type": "Unconfined"}),
            Mutant(
                "the annotation of old",
                "metadata",
                lambda metadata: metadata.setdefault("annotations", {}).update(
                    {"container.apparmor.security.beta.kubernetes.io/stage": "unconfined"}
                ),
            ),
        ],
    ),
    "SELinux": (
        selinux,
        [
            *in_context("a type", seLinuxOptions={"type": "spc_t"}),
            *in_context("a user", seLinuxOptions={"user": "system_u"}),
            *in_context("a role", seLinuxOptions={"role": "system_r"}),
        ],
    ),
    "/proc Mount Type": (proc_mount, in_containers("unmasked", procMount="Unmasked")),
    "Sysctls": (
        sysctls,
        _context("an unsafe one", "spec", {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]}),
    ),
    "Volume Types": (
        volume_types,
        [
            volume("nfs", server="files.example.org", path="/"),
            volume("iscsi", targetPortal="10.0.0.1", iqn="iqn.2026-11.org.example:disk", lun=0),
            volume("gitRepo", repository="https://example.org/repository"),
            volume("hostPath", path="/var/lib"),
            volume("rbd", monitors=["10.0.0.1"], image="disk"),
        ],
    ),
    "Privilege Escalation": (
        no_privilege_escalation,
        [
            *in_containers("allowed", allowPrivilegeEscalation=True),
            *(without("allowPrivilegeEscalation", kind) for kind in KINDS_OF_CONTAINER),
        ],
    ),
    "Running as Non-root": (
        running_as_non_root,
        [
            *in_containers("not asked for", runAsNonRoot=False),
            Mutant("nowhere", "spec", non_root_nowhere),
        ],
    ),
    "Running as Non-root user": (no_root_user, in_context("root", runAsUser=0)),
    "Seccomp": (
        seccomp,
        [
            *in_context("unconfined", seccompProfile={"type": "Unconfined"}),
            Mutant("nowhere", "spec", seccomp_nowhere),
        ],
    ),
    "Capabilities": (
        capabilities,
        [
            *in_containers("added", capabilities={"drop": ["ALL"], "add": ["SYS_PTRACE"]}),
            *in_containers("some dropped", capabilities={"drop": ["NET_RAW"]}),
            *(without("capabilities", kind) for kind in KINDS_OF_CONTAINER),
        ],
    ),
}


def broken(pod: Json) -> set[str]:
    return {control for control, (holds, _) in CONTROLS.items() if not holds(pod)}


@pytest.mark.parametrize("case", CASES)
def test_every_pod_is_restricted(case: str) -> None:
    found = {name: broken(pod) for name, pod in pods(render(case))}
    assert [control for broken_here in found.values() for control in broken_here] == []
    assert bool(found) is (case != "administrator")


@functools.cache
def conforming() -> Json:
    """The train pod, with a container of each other kind beside its own."""
    pod = copy.deepcopy(dict(pods(render("base")))["train"])
    for kind in KINDS_OF_CONTAINER[1:]:
        pod["spec"][kind] = [copy.deepcopy(pod["spec"]["containers"][0]) | {"name": kind.lower()}]
    assert broken(pod) == set()
    return pod


def parts_of(pod: Json, part: str) -> Json:
    if part in ("spec", "metadata"):
        found: Json = pod[part]
        return found
    container: Json = pod["spec"][part][0]
    return container


@pytest.mark.parametrize(
    ("control", "mutant"),
    [
        pytest.param(control, mutant, id=f"{control}: {mutant.name}")
        for control, (_, mutants) in CONTROLS.items()
        for mutant in mutants
    ],
)
def test_a_mutant_is_caught(control: str, mutant: Mutant) -> None:
    pod = copy.deepcopy(conforming())
    mutant.change(parts_of(pod, mutant.part))
    caught = broken(pod)
    assert control in caught
    assert caught - {control} <= ({"HostPath Volumes"} if control == "Volume Types" else {"Volume Types"})


def test_every_control_has_a_mutant() -> None:
    assert [control for control, (_, mutants) in CONTROLS.items() if not mutants] == []

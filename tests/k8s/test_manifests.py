"""What the manifests promise beyond Pod Security: schemas, limits, retries, who reaches whom."""

from __future__ import annotations

import copy
import ipaddress
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tunemill.image import IMAGES
from tunemill.kube.driver import RULES as driver_rules
from tunemill.kube.look import NEEDED

from .conftest import CASES, COMPONENTS, OVERLAYS, TREE, Json, job_specs, of_kind, pods, render

OLDEST = "1.31"  # the first in which podFailurePolicy is stable
NEWEST = kubernetes_validate.latest_version()
CUSTOM = ("JobSet", "TrainingRuntime", "TrainJob")
"""Kinds that no schema of Kubernetes itself describes; the Jobs in them are validated as Jobs."""
STAGE_NAMES = [stage for stage in IMAGES if stage != "convert-lora"]
CHECKOV = "3.3.30"
SCANNED = [
    "administrator",
    "all-components",
    "all-components-backwards",
    *(f"overlay-{name}" for name in OVERLAYS),
]
PLACEHOLDER = "sha256:" + "0" * 64


def known_objects(objects: Iterable[Json]) -> list[Json]:
    """Return what Kubernetes has schemas for, and as Jobs those that a JobSet or a TrainJob makes."""
    own = [found for found in objects if found["kind"] not in CUSTOM]
    like = next((found["metadata"] for found in own if found["kind"] == "Job"), {})
    made = [
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": like | {"name": name}, "spec": spec}
        for name, spec in job_specs(tuple(found for found in objects if found["kind"] in CUSTOM))
    ]
    return own + made


def test_the_tree_is_the_one_that_is_documented() -> None:
    promised = {"gpu", "kueue", "spot", "multinode", "cache", "store", "shards"}
    assert promised <= set(COMPONENTS)
    assert {"laptop", "university", "cloud-spot", "jobset", "trainjob"} <= set(OVERLAYS)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("case", CASES)
def test_objects_are_valid_in_the_oldest_and_the_newest_kubernetes(case: str, version: str) -> None:
    for found in known_objects(render(case)):
        kubernetes_validate.validate(found, version, strict=True)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_the_validation_sees_what_is_misspelt(version: str) -> None:
    job = copy.deepcopy(of_kind(render("base"), "Job")["train"])
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 120
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(job, version, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_every_container_is_confined_and_bounded(case: str) -> None:
    for name, pod in pods(render(case)):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, name
        assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == 65532, name
        for container in spec["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, name
            for amounts in ("requests", "limits"):
                assert {"cpu", "memory"} <= set(container["resources"][amounts]), name
            assert re.search(r"@sha256:[0-9a-f]{64}$", container["image"]), container["image"]


@pytest.mark.parametrize("case", CASES)
def test_a_stage_s_image_is_nobody_s_until_a_digest_is_put_in(case: str) -> None:
    for name, spec in job_specs(render(case)):
        (container,) = spec["template"]["spec"]["containers"]
        stage = container["args"][0]
        assert container["image"].endswith(f"tunemill/{IMAGES[stage]}@{PLACEHOLDER}"), name


@pytest.mark.parametrize("case", CASES)
def test_every_job_ends_some_day_and_retries_what_may_get_better(case: str) -> None:
    for name, spec in job_specs(render(case)):
        (container,) = spec["template"]["spec"]["containers"]
        assert spec["activeDeadlineSeconds"] > 0, name
        assert spec["template"]["spec"]["restartPolicy"] == "Never", name
        disruption, hopeless, again = spec["podFailurePolicy"]["rules"]
        assert disruption == {
            "action": "Ignore",
            "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
        }
        assert (hopeless["action"], hopeless["onExitCodes"]["values"]) == ("FailJob", [2, 65, 77, 78])
        assert (again["action"], again["onExitCodes"]["values"]) == ("Count", [75, 143])
        for rule in (hopeless, again):
            assert rule["onExitCodes"]["containerName"] == container["name"], name


def test_finished_jobs_go_away_by_themselves() -> None:
    for case in CASES:
        for found in render(case):
            if found["kind"] in ("Job", "JobSet"):
                assert found["spec"]["ttlSecondsAfterFinished"] > 0
            if found["kind"] == "TrainingRuntime":
                assert found["spec"]["template"]["spec"]["ttlSecondsAfterFinished"] > 0


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_each_stage_is_one_job_that_the_client_finds(stage: str) -> None:
    for case in CASES:
        if case == "administrator" or (stage == "train" and case in ("overlay-jobset", "overlay-trainjob")):
            continue
        jobs = [found for found in render(case) if found["kind"] == "Job"]
        (job,) = [
            found for found in jobs if found["metadata"]["labels"]["app.kubernetes.io/component"] == stage
        ]
        labels = job["spec"]["template"]["metadata"]["labels"]
        assert labels["app.kubernetes.io/component"] == stage
        assert labels["app.kubernetes.io/part-of"] == "tunemill"
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert (container["name"], container["args"][0]) == ("stage", stage)


@pytest.mark.parametrize("case", CASES)
def test_what_a_namespace_needs_once_can_be_applied_without_the_jobs(case: str) -> None:
    if case == "administrator":
        return
    for found in render(case):
        runs = found["kind"] in ("Job", "JobSet", "TrainJob")
        setup = found["metadata"]["labels"].get("tunemill.dev/setup") == "true"
        assert setup is not runs, found["metadata"]["name"]


@pytest.mark.parametrize("case", CASES)
def test_every_mount_has_its_volume_and_every_volume_its_mount(case: str) -> None:
    for name, pod in pods(render(case)):
        claimed = {"data"} if name == "tunemill-store" else set()
        mounted = {mount["name"] for part in pod["spec"]["containers"] for mount in part["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]} | claimed, name


@pytest.mark.parametrize("case", CASES)
def test_variables_in_commands_are_there_when_the_kubelet_fills_them_in(case: str) -> None:
    for name, spec in job_specs(render(case)):
        (container,) = spec["template"]["spec"]["containers"]
        defined = {entry["name"] for entry in container["env"]}
        if spec.get("completionMode") == "Indexed":
            defined.add("JOB_COMPLETION_INDEX")
        words = [*container.get("command", []), *container["args"]]
        used = set(re.findall(r"\$\((\w+)\)", " ".join(words)))
        assert used <= defined, name


def test_no_secret_is_in_the_tree() -> None:
    for case in CASES:
        assert not of_kind(render(case), "Secret")
    written = "".join(path.read_text() for path in TREE.rglob("*.yaml"))
    assert not re.search(r"(access_key|AccessKey|token|password)\w*\s*[:=]\s*\S{12,}", written)


def test_components_give_the_same_in_any_order() -> None:
    def summary(case: str) -> Json:
        found: Json = {}
        for name, spec in job_specs(render(case)):
            pod = spec["template"]["spec"]
            (container,) = pod["containers"]
            env = {entry["name"]: entry.get("value") for entry in container["env"]}
            tolerated = sorted(entry["key"] for entry in pod["tolerations"])
            found[name] = (spec["backoffLimit"], tolerated, env, container["resources"], pod["affinity"])
        return found

    names = "train", "imatrix", "quantize", "infer"
    forward, backward = summary("all-components"), summary("all-components-backwards")
    assert {name: forward[name] for name in names} == {name: backward[name] for name in names}
    assert len(forward["train"][1]) == 6


def test_a_gpu_goes_to_the_stages_that_use_one() -> None:
    plain, with_gpu = (dict(job_specs(render(case))) for case in ("base", "component-gpu"))
    for stage in STAGE_NAMES:
        (container,) = with_gpu[stage]["template"]["spec"]["containers"]
        asked = container["resources"]["limits"].get("nvidia.com/gpu")
        assert asked == container["resources"]["requests"].get("nvidia.com/gpu")
        assert asked == ("1" if stage in ("train", "imatrix", "quantize", "gptq", "infer") else None)
        if asked is None:
            assert with_gpu[stage] == plain[stage]
    volumes = {volume["name"]: volume for volume in with_gpu["train"]["template"]["spec"]["volumes"]}
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}


def test_a_queue_starts_the_jobs() -> None:
    for job in of_kind(render("component-kueue"), "Job").values():
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "tunemill"
        assert job["spec"]["suspend"] is True
    for job in of_kind(render("base"), "Job").values():
        assert "suspend" not in job["spec"]


def test_training_gets_time_to_save() -> None:
    for case in ("base", "component-spot", "overlay-jobset", "overlay-trainjob"):
        specs = dict(job_specs(render(case)))
        (train,) = [spec for name, spec in specs.items() if "train" in name]
        assert train["template"]["spec"]["terminationGracePeriodSeconds"] >= 120


MULTINODE = {
    "component-multinode": ("train", "$(JOB)-0.tunemill-train."),
    "overlay-jobset": ("train-node", "$(JOB)-0.$(JOBSET)."),
    "overlay-trainjob": ("tunemill-train-node", "$(JOB)-0.$(JOBSET)."),
}


@pytest.mark.parametrize("case", MULTINODE)
def test_nodes_meet_at_the_first_one(case: str) -> None:
    name, address = MULTINODE[case]
    spec = dict(job_specs(render(case)))[name]
    (container,) = spec["template"]["spec"]["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert str(spec["completions"]) == str(spec["parallelism"]) == env["NODES"]
    command = container["command"]
    assert command[:3] == ["python", "-m", "tunemill.train.launch"]
    assert f"--rdzv-endpoint={address}$(NAMESPACE).svc.$(CLUSTER_DOMAIN):29500" in command
    assert command[-2:] == ["-m", "tunemill.cli"]
    assert container["args"] == ["train"]


def test_torchrun_understands_the_command() -> None:
    torchrun = pytest.importorskip("torch.distributed.run")
    spec = dict(job_specs(render("component-multinode")))["train"]
    (container,) = spec["template"]["spec"]["containers"]
    values = {"NODES": "2", "PROCESSES": "4", "JOB": "train-x", "NAMESPACE": "lab", "ADDRESS": "10.0.0.7"}
    values["CLUSTER_DOMAIN"] = "cluster.local"
    words = [*container["command"][3:], *container["args"], "--run", "x"]
    filled = [re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], word) for word in words]
    parser = torchrun.get_args_parser()
    parser.allow_abbrev = False  # as tunemill.train.launch has it
    config, _, arguments = torchrun.config_from_args(parser.parse_args(filled))
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (2, 2, 4)
    assert config.rdzv_endpoint == "train-x-0.tunemill-train.lab.svc.cluster.local:29500"
    assert (config.rdzv_backend, config.run_id, config.max_restarts) == ("c10d", "train-x", 3)
    assert {"read_timeout": "600", "join_timeout": "3600"}.items() <= config.rdzv_configs.items()
    assert arguments[-5:] == ["-m", "tunemill.cli", "train", "--run", "x"]


def test_nodes_of_a_job_are_found_by_name_before_they_are_ready() -> None:
    objects = render("component-multinode")
    service = of_kind(objects, "Service")["tunemill-train"]["spec"]
    train = of_kind(objects, "Job")["train"]["spec"]["template"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"] is True
    assert train["spec"]["subdomain"] == "tunemill-train"
    assert service["selector"].items() <= train["metadata"]["labels"].items()


def test_jobset_and_trainjob_have_the_fields_of_their_apis() -> None:
    jobset = of_kind(render("overlay-jobset"), "JobSet")["train"]
    runtime = of_kind(render("overlay-trainjob"), "TrainingRuntime")["tunemill-train"]
    trainjob = of_kind(render("overlay-trainjob"), "TrainJob")["train"]
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert runtime["apiVersion"] == trainjob["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    for spec in (jobset["spec"], runtime["spec"]["template"]["spec"]):
        assert set(spec) == {"ttlSecondsAfterFinished", "network", "failurePolicy", "replicatedJobs"}
        assert set(spec["failurePolicy"]["rules"][0]) == {"name", "action", "onJobFailureReasons"}
        assert spec["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    assert set(trainjob["spec"]) == {"runtimeRef", "trainer"}
    assert trainjob["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["template"]["metadata"]["labels"] == {
        "trainer.kubeflow.org/trainjob-ancestor-step": "trainer"
    }
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    assert container["name"] == replicated["name"] == "node"
    assert trainjob["spec"]["trainer"]["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"]


def test_each_index_takes_its_shard() -> None:
    spec = dict(job_specs(render("component-shards")))["infer"]
    (container,) = spec["template"]["spec"]["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert str(spec["completions"]) == env["SHARDS"]
    assert container["args"] == [
        "infer",
        "--set",
        "shard_count=$(SHARDS)",
        "--set",
        "shard_index=$(JOB_COMPLETION_INDEX)",
    ]
    join = dict(job_specs(render("component-shards")))["join"]
    (joins,) = join["template"]["spec"]["containers"]
    assert joins["args"] == ["infer", "--set", "shard_count=$(SHARDS)"]
    assert env["SHARDS"] == {entry["name"]: entry["value"] for entry in joins["env"]}["SHARDS"]
    assert spec["backoffLimitPerIndex"] > 0
    assert spec["maxFailedIndexes"] == 0


@pytest.mark.parametrize(
    ("component", "kind"), [("cache", "persistentVolumeClaim"), ("scratch", "ephemeral")]
)
def test_work_is_one_volume_of_one_kind(component: str, kind: str) -> None:
    for name, pod in pods(render(f"component-{component}")):
        (work,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == "work"]
        assert set(work) == {"name", kind}, name


def test_the_store_in_the_cluster_is_the_one_on_workstations() -> None:
    server = yaml.safe_load((TREE.parent / "compose/compose.yaml").read_text())["services"]["s3"]
    (pod,) = [pod for name, pod in pods(render("component-store")) if name == "tunemill-store"]
    (container,) = pod["spec"]["containers"]
    assert f":-{container['image']}}}" in server["image"]
    here, there = container["command"][-1], server["entrypoint"][-1]
    assert here.replace("/run/secrets/tunemill/", "/run/secrets/") == there
    store = of_kind(render("component-store"), "ConfigMap")["tunemill-store"]["data"]
    service = of_kind(render("component-store"), "Service")["tunemill-store"]
    assert store["AWS_ENDPOINT_URL_S3"] == f"http://tunemill-store:{service['spec']['ports'][0]['port']}"


def allows(objects: tuple[Json, ...], direction: str, own: Json, other: Json | str, port: int) -> bool:
    """Say whether policies let a pod with the labels ``own`` exchange with labels or an address, over TCP.

    Only what the manifests use: selectors of pods, of all namespaces, and blocks of addresses. A namespace
    that is not selected is the pod's own.
    """
    key, side = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    chosen = [
        policy["spec"]
        for policy in of_kind(objects, "NetworkPolicy").values()
        if direction in policy["spec"]["policyTypes"] and selects(policy["spec"]["podSelector"], own)
    ]
    if not chosen:
        return True
    rules = [rule for policy in chosen for rule in policy.get(key) or []]
    return any(
        any(is_peer(peer, other) for peer in rule[side])
        and (not rule.get("ports") or any(found["port"] == port for found in rule["ports"]))
        for rule in rules
    )


def selects(selector: Json, labels: Json) -> bool:
    wanted = selector.get("matchLabels") or {}
    expressions = selector.get("matchExpressions") or []
    assert {found["operator"] for found in expressions} <= {"In"}
    return wanted.items() <= labels.items() and all(
        labels.get(found["key"]) in found["values"] for found in expressions
    )


def is_peer(peer: Json, other: Json | str) -> bool:
    if isinstance(other, str):
        if "ipBlock" not in peer:
            return False
        address = ipaddress.ip_address(other)
        left_out = peer["ipBlock"].get("except") or []
        return address in ipaddress.ip_network(peer["ipBlock"]["cidr"]) and not any(
            address in ipaddress.ip_network(block) for block in left_out
        )
    if "namespaceSelector" in peer:
        return peer["namespaceSelector"] == {} and "podSelector" not in peer
    return "podSelector" in peer and selects(peer["podSelector"], other)


def labels_of(component: str) -> Json:
    return {"app.kubernetes.io/part-of": "tunemill", "app.kubernetes.io/component": component}


INTERNET, PRIVATE, METADATA, PUBLIC_SIX = "140.82.121.3", "10.20.30.40", "169.254.169.254", "2606:50c0::1"


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_stages_reach_names_and_the_store_and_two_of_them_a_hub(stage: str) -> None:
    objects, own = render("component-store"), labels_of(stage)
    assert allows(objects, "Egress", own, labels_of("store"), 7070)
    assert allows(objects, "Ingress", labels_of("store"), own, 7070)
    assert allows(objects, "Egress", own, {"k8s-app": "kube-dns"}, 53)
    for address in (INTERNET, PUBLIC_SIX):
        assert allows(objects, "Egress", own, address, 443) is (stage in ("fetch", "prepare"))
        assert not allows(objects, "Egress", own, address, 53)
        assert not allows(objects, "Egress", own, address, 80)
    for address in (PRIVATE, METADATA):
        for port in (80, 443, 6443):
            assert not allows(objects, "Egress", own, address, port)
    assert not allows(objects, "Egress", own, labels_of("train"), 29500)
    assert not allows(objects, "Ingress", own, labels_of("train"), 29500)
    assert not allows(objects, "Ingress", own, {}, 80)


def test_the_store_asks_nobody_and_answers_no_strangers() -> None:
    objects = render("component-store")
    assert not allows(objects, "Ingress", labels_of("store"), {"app": "stranger"}, 7070)
    assert not allows(objects, "Ingress", labels_of("store"), labels_of("infer"), 22)
    assert not allows(objects, "Egress", labels_of("store"), INTERNET, 443)


def test_a_store_outside_is_reached_at_its_port_and_nothing_else() -> None:
    everywhere, narrow = render("component-external-store"), render("overlay-university")
    for objects, address in ((everywhere, INTERNET), (everywhere, PRIVATE), (narrow, "192.0.2.10")):
        assert allows(objects, "Egress", labels_of("merge"), address, 443)
        assert not allows(objects, "Egress", labels_of("merge"), address, 80)
    assert not allows(everywhere, "Egress", labels_of("merge"), METADATA, 443)
    assert not allows(narrow, "Egress", labels_of("merge"), INTERNET, 443)


def test_nodes_that_train_together_talk_to_each_other_and_others_do_not() -> None:
    objects = render("component-multinode")
    for direction in ("Egress", "Ingress"):
        assert allows(objects, direction, labels_of("train"), labels_of("train"), 41234)
        assert not allows(objects, direction, labels_of("infer"), labels_of("train"), 41234)
        assert not allows(objects, direction, labels_of("train"), labels_of("infer"), 29500)
        assert not allows(render("base"), direction, labels_of("train"), labels_of("train"), 29500)


def test_the_service_account_has_no_rights_and_no_token() -> None:
    for case in CASES:
        objects = render(case)
        accounts = of_kind(objects, "ServiceAccount")
        assert all(found["automountServiceAccountToken"] is False for found in accounts.values())
        for binding in (
            *of_kind(objects, "RoleBinding").values(),
            *of_kind(objects, "ClusterRoleBinding").values(),
        ):
            assert {subject["kind"] for subject in binding["subjects"]} == {"Group"}


def test_who_submits_may_do_that_and_no_more() -> None:
    objects = render("administrator")
    rules = of_kind(objects, "Role")["tunemill-submitter"]["rules"]
    rights = {
        (group, resource, verb): set(rule.get("resourceNames") or ())
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert not any("*" in right for right in rights)
    driver = {
        (group, resource, verb)
        for rule in driver_rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert {*NEEDED, *driver} <= set(rights)  # nobody may grant a right that they do not have
    assert not {("", "pods", "create"), ("", "pods/exec", "create"), ("", "secrets", "list")} & set(rights)
    assert rights["", "secrets", "get"] == {"tunemill-store", "tunemill-hub", "tunemill-registry"}
    for role in of_kind(objects, "ClusterRole").values():
        assert {verb for rule in role["rules"] for verb in rule["verbs"]} <= {"get", "list"}
    labels = of_kind(objects, "Namespace")["tunemill"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_checkov_finds_nothing(tmp_path: Path) -> None:
    uvx = Path(sys.executable).with_name("uvx")
    if not uvx.exists() and shutil.which("uvx") is None:
        pytest.skip("uvx is not installed here, which runs checkov in an environment of its own")
    for case in SCANNED:
        (tmp_path / f"{case}.yaml").write_text(yaml.safe_dump_all(known_objects(render(case))))
    scanned = subprocess.run(
        [
            str(uvx) if uvx.exists() else "uvx",
            "--quiet",
            f"checkov=={CHECKOV}",
            *("--framework", "kubernetes", "secrets"),
            *("--skip-download", "--quiet", "--compact", "-o", "json", "-d", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    if not scanned.stdout.strip():
        pytest.skip(f"checkov does not run here: {scanned.stderr.strip()[-200:]}")
    reports = json.loads(scanned.stdout)
    reports = reports if isinstance(reports, list) else [reports]
    failed = [
        (check["check_id"], check["resource"], check["file_path"])
        for report in reports
        for check in report.get("results", {}).get("failed_checks", [])
    ]
    assert failed == []
    assert sum(report.get("summary", report)["passed"] for report in reports) > 1000


def test_what_checkov_skips_has_its_reason() -> None:
    for case in CASES:
        for found in render(case):
            notes = found["metadata"].get("annotations") or {}
            skips = {name: value for name, value in notes.items() if name.startswith("checkov.io/skip")}
            assert all(re.fullmatch(r"CKV_K8S_15=.{20,}", value) for value in skips.values())
            assert bool(skips) is (found["kind"] == "Job")

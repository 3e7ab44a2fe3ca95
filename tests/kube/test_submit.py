"""``tunemill submit`` and its siblings against a server that answers as the API does."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from apiserver import Cluster, Fault, Json
from tunemill import __version__
from tunemill.action import action_tag
from tunemill.progress import Progress
from tunemill.recipe import RECIPES, Choice, resolve
from tunemill.stage import plan
from tunemill.stages import known_keys, load_stage
from tunemill.store import Draft, Provenance, open_store

Run = Callable[..., tuple[int, str, str]]
Settings = Callable[..., Path]
TINY = ("--model", "tiny", "--task", "stdlib")
REFERENCE = f"base/tiny@sha256:{'b' * 64}"


def finish(cluster: Cluster, job: Json, *lines: str, code: int = 0) -> None:
    """Let a Job's only pod write lines, end with a code, and the Job with it."""
    pod = cluster.start_pod(job)
    cluster.write(pod, *lines)
    time.sleep(0.3)
    cluster.end_pod(pod, code)
    name = job["metadata"]["name"]
    if code == 0:
        cluster.end_job(name, "Complete")
    else:
        cluster.end_job(name, "Failed", "PodFailurePolicy", f"Container stage for pod lab/{pod} failed")


def publish_fetched(folder: Path, facts: Json | None = None) -> str:
    """Publish what the tiny model's fetch would have made, and return its reference."""
    store, files = open_store(str(folder / "store")), folder / "files"
    files.mkdir()
    (files / "config.json").write_text("{}")
    recipe = resolve(Choice(model="tiny", task="stdlib"), known_keys())
    planned = plan(store, load_stage("fetch"), recipe, {})
    assert planned.key
    moment = datetime.now(UTC)
    made = Provenance(
        stage="fetch",
        tool_version=__version__,
        config={},
        origins={},
        inputs={},
        host=planned.host.record(),
        action_key=planned.key,
        image=None,
        llama_cpp=None,
        started=moment,
        finished=moment,
    )
    draft = Draft(planned.output, "base", files, facts or {}, made, (action_tag(planned.key),))
    return store.publish(draft, Progress(quiet=True)).reference


def playing(cluster: Cluster, play: Callable[[Json], None]) -> None:
    """Play a controller's part for every Job that is created, in a thread."""
    cluster.on_create = lambda job: threading.Thread(target=play, args=(job,), daemon=True).start()


class TestSubmit:
    def test_a_stage_ends_with_its_reference_and_its_log(self, cluster: Cluster, run: Run) -> None:
        playing(cluster, lambda job: finish(cluster, job, "fetch: running", "fetch 1/1 files", REFERENCE))
        code, stdout, stderr = run("submit", "fetch", *TINY)
        assert (code, stdout) == (0, f"{REFERENCE}\n")
        assert "fetch 1/1 files" in stderr
        assert stderr.count("fetch: running") == 1
        (name,) = cluster.names("jobs")
        assert name.startswith("fetch-tiny-stdlib-")

    @pytest.mark.parametrize("code", [1, 2, 65, 70, 75, 77, 78, 143])
    def test_the_exit_code_is_the_stages_own(self, cluster: Cluster, run: Run, code: int) -> None:
        playing(cluster, lambda job: finish(cluster, job, "tunemill: no", code=code))
        found, stdout, stderr = run("submit", "fetch", *TINY)
        assert (found, stdout) == (code, "")
        assert "tunemill: no" in stderr
        assert f"failed with exit code {code}" in stderr.splitlines()[-1]

    def test_a_pod_that_ran_out_of_memory_names_the_limit(self, cluster: Cluster, run: Run) -> None:
        def play(job: Json) -> None:
            cluster.end_pod(cluster.start_pod(job), 137, "OOMKilled")
            cluster.end_job(job["metadata"]["name"], "Failed", "BackoffLimitExceeded", "too often")

        playing(cluster, play)
        code, _, stderr = run("submit", "fetch", *TINY, "--memory", "1Gi")
        assert code == 78
        assert "ran out of memory (1Gi): submit it with --memory" in stderr

    def test_a_pod_taken_away_is_said_and_the_next_one_followed(self, cluster: Cluster, run: Run) -> None:
        def play(job: Json) -> None:
            first = cluster.start_pod(job, "first")
            cluster.write(first, "step 1")
            time.sleep(0.3)
            disruption = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
            cluster.end_pod(first, 143, conditions=[disruption])
            second = cluster.start_pod(job, "second")
            cluster.write(second, "resumed at step 1", REFERENCE)
            time.sleep(0.3)
            cluster.end_pod(second, 0)
            cluster.end_job(job["metadata"]["name"], "Complete")

        playing(cluster, play)
        code, stdout, stderr = run("submit", "fetch", *TINY)
        assert (code, stdout) == (0, f"{REFERENCE}\n")
        assert "was taken away (PreemptionByScheduler)" in stderr
        assert stderr.index("step 1") < stderr.index("resumed at step 1")

    def test_what_is_created_is_what_was_asked_for(
        self, cluster: Cluster, run: Run, settings: Settings
    ) -> None:
        cluster.kueue = True
        cluster.put("localqueues", {"metadata": {"name": "gpu"}})
        cluster.put("nodes", {"metadata": {"name": "a"}, "status": {"allocatable": {"nvidia.com/gpu": "4"}}})
        settings(
            queue="gpu",
            priorityClass="low",
            nodeSelector={"kind": "h200"},
            tolerations=[{"key": "gpu", "operator": "Exists"}],
            gpu={"resource": "nvidia.com/gpu", "count": 4},
            store={"url": "s3://lab/x", "endpoint": "http://127.0.0.1:1", "region": "eu"},
        )
        words = (
            "train",
            *TINY,
            "--gpus",
            "2",
            "--memory",
            "40Gi",
            "--set",
            "seed=7",
            "--input",
            "base=base/tiny",
        )
        code, stdout, stderr = run("submit", *words, "--detach")
        assert code == 0, stderr
        assert stdout.strip() in cluster.names("jobs")
        job = cluster.get("jobs", stdout.strip())
        assert job
        pod = job["spec"]["template"]["spec"]
        container = pod["containers"][0]
        assert container["image"].startswith("registry.example/tunemill/train@sha256:")
        words = ["train", *TINY, "--run", "tiny-stdlib", "--set", "seed=7", "--input", "base=base/tiny"]
        assert container["args"] == words
        environment = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert environment["TUNEMILL_IMAGE"] == container["image"]
        assert environment["TUNEMILL_STORE"] == "s3://lab/x"
        assert "envFrom" not in container
        for part in ("requests", "limits"):
            assert container["resources"][part]["nvidia.com/gpu"] == "2"
            assert container["resources"][part]["memory"] == "40Gi"
        assert job["spec"]["suspend"] is True
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
        assert job["metadata"]["annotations"]["tunemill.dev/output"] == "tiny-stdlib/adapter"
        assert json.loads(job["metadata"]["annotations"]["tunemill.dev/arguments"]) == words
        assert (pod["priorityClassName"], pod["nodeSelector"]) == ("low", {"kind": "h200"})
        assert {"key": "gpu", "operator": "Exists"} in pod["tolerations"]
        assert "looks by itself whether its output exists" in stderr  # no such store at that endpoint
        assert len(job["metadata"]["name"]) <= 63

    @pytest.mark.parametrize(
        ("words", "nodes", "processes"),
        [
            (("--nodes", "3", "--gpus", "0"), "3", "1"),
            (("--gpus", "4"), "1", "gpu"),
            (("--nodes", "2", "--gpus", "8"), "2", "gpu"),
        ],
    )
    def test_several_processes_train_behind_a_service(
        self,
        cluster: Cluster,
        run: Run,
        settings: Settings,
        words: tuple[str, ...],
        nodes: str,
        processes: str,
    ) -> None:
        settings(store=None, gpu={"count": 8})
        cluster.put("nodes", {"metadata": {"name": "a"}, "status": {"allocatable": {"nvidia.com/gpu": "8"}}})
        code, stdout, stderr = run("submit", "train", *TINY, *words, "--detach")
        assert code == 0, stderr
        job = cluster.get("jobs", stdout.strip())
        assert job
        assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (int(nodes), int(nodes))
        container = job["spec"]["template"]["spec"]["containers"][0]
        environment = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert (environment["NODES"], environment["PROCESSES"]) == (nodes, processes)
        assert "tunemill.train.launch" in container["command"]
        assert cluster.names("services") == ["tunemill-train"]

    def test_the_tree_s_own_number_of_nodes_stands(
        self, cluster: Cluster, run: Run, settings: Settings
    ) -> None:
        settings(components=["multinode"], store=None, gpu={"count": 8})
        cluster.put("nodes", {"metadata": {"name": "a"}, "status": {"allocatable": {"nvidia.com/gpu": "8"}}})
        code, stdout, stderr = run("submit", "train", *TINY, "--gpus", "4", "--detach")
        assert code == 0, stderr
        job = cluster.get("jobs", stdout.strip())
        assert job
        assert job["spec"]["completions"] == 2

    def test_a_model_that_no_gpu_can_hold_is_refused_before_it_waits_for_one(
        self, cluster: Cluster, run: Run, settings: Settings, tmp_path: Path
    ) -> None:
        settings(gpu={"resource": "nvidia.com/gpu", "count": 4, "memory": "24576Mi"})
        publish_fetched(tmp_path, {"parameters": 70_000_000_000})
        training = ("submit", "train", *TINY, "--set", "method=qlora", "--detach")
        code, _, stderr = run(*training)
        assert code == 78
        assert "method=qlora needs at least 34Gi on each GPU for a model of 70.0 B parameters" in stderr
        assert stderr.count("\n") == 1
        code, _, stderr = run(*training, "--set", "memory_check=false")
        assert code == 2  # what is missing next
        assert "train needs data" in stderr
        assert cluster.names("jobs") == []

    def test_the_server_is_asked_before_anything_is_created(self, cluster: Cluster, run: Run) -> None:
        assert run("submit", "fetch", *TINY, "--detach")[0] == 0
        posts = [path for method, path in cluster.requests if method == "POST" and "/jobs" in path]
        assert ["dryRun=All" in path for path in posts] == [True, False]

    def test_a_dry_run_creates_nothing(self, cluster: Cluster, run: Run) -> None:
        code, stdout, stderr = run("submit", "fetch", *TINY, "--dry-run")
        assert code == 0
        assert yaml.safe_load(stdout)["kind"] == "Job"
        assert cluster.names("jobs") == []
        assert "would submit fetch-tiny-stdlib-" in stderr
        assert cluster.names("serviceaccounts") == []

    def test_what_a_job_needs_beside_itself_is_created_once(self, cluster: Cluster, run: Run) -> None:
        run("submit", "fetch", *TINY, "--detach")
        assert cluster.names("serviceaccounts") == ["tunemill"]
        assert "tunemill-deny" in cluster.names("networkpolicies")

    def test_a_recipe_file_goes_with_the_job(self, cluster: Cluster, run: Run, tmp_path: Path) -> None:
        recipe = (RECIPES / "models/tiny.yaml").read_text()
        (tmp_path / "oak.yaml").write_text(recipe)
        code, stdout, stderr = run("submit", "fetch", "--model", "oak.yaml", "--run", "forest", "--detach")
        assert code == 0, stderr
        name = stdout.strip()
        files, job = cluster.get("configmaps", name), cluster.get("jobs", name)
        assert files
        assert job
        assert files["data"] == {"oak.yaml": recipe}
        assert files["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
        assert "/run/tunemill/oak.yaml" in job["spec"]["template"]["spec"]["containers"][0]["args"]


class TestTheSameWorkTwice:
    def test_the_second_follows_the_first(self, cluster: Cluster, run: Run) -> None:
        first = run("submit", "fetch", *TINY, "--detach")[1].strip()
        job = cluster.get("jobs", first)
        assert job
        threading.Thread(target=finish, args=(cluster, job, "fetched", REFERENCE), daemon=True).start()
        code, stdout, stderr = run("submit", "fetch", *TINY)
        assert (code, stdout) == (0, f"{REFERENCE}\n")
        assert f"{first} is there already" in stderr
        assert cluster.names("jobs") == [first]

    def test_a_lost_answer_to_create_is_no_second_job(self, cluster: Cluster, run: Run) -> None:
        cluster.faults.append(Fault("POST", "fieldValidation=Strict", times=1, status=500))
        code, stdout, _ = run("submit", "fetch", *TINY, "--detach")
        assert code == 0
        assert cluster.names("jobs") == [stdout.strip()]

    def test_a_job_that_appears_meanwhile_is_followed(self, cluster: Cluster, run: Run) -> None:
        name = run("submit", "fetch", *TINY, "--detach")[1].strip()
        cluster.faults.append(
            Fault("GET", f"/jobs/{name}", 1, 404, {"kind": "Status", "code": 404, "reason": "NotFound"})
        )
        cluster.faults.append(Fault("POST", "dryRun=All", 1, 201, {"kind": "Job"}))
        code, stdout, _ = run("submit", "fetch", *TINY, "--detach")
        assert (code, stdout.strip()) == (0, name)

    def test_a_failed_one_is_replaced(self, cluster: Cluster, run: Run) -> None:
        name = run("submit", "fetch", *TINY, "--detach")[1].strip()
        before = cluster.get("jobs", name)
        cluster.end_job(name, "Failed", "BackoffLimitExceeded", "too often", announced=False)
        code, stdout, stderr = run("submit", "fetch", *TINY, "--detach")
        assert (code, stdout.strip()) == (0, name)
        assert f"{name} failed before; replacing it" in stderr
        after = cluster.get("jobs", name)
        assert before
        assert after
        assert before["metadata"]["uid"] != after["metadata"]["uid"]

    def test_one_that_never_started_is_replaced_when_the_settings_changed(
        self, cluster: Cluster, run: Run
    ) -> None:
        name = run("submit", "fetch", *TINY, "--detach")[1].strip()
        code, _, stderr = run("submit", "fetch", *TINY, "--memory", "7Gi", "--detach")
        job = cluster.get("jobs", name)
        assert job
        assert code == 0
        assert "has not started and was submitted with other settings" in stderr
        assert job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] == "7Gi"

    def test_one_that_runs_is_never_replaced(self, cluster: Cluster, run: Run) -> None:
        name = run("submit", "fetch", *TINY, "--detach")[1].strip()
        job = cluster.get("jobs", name)
        assert job
        cluster.start_pod(job)
        code, _, stderr = run("submit", "fetch", *TINY, "--memory", "7Gi", "--detach")
        after = cluster.get("jobs", name)
        assert after
        assert code == 0
        assert "runs with other settings" in stderr
        assert after["metadata"]["uid"] == job["metadata"]["uid"]

    def test_an_output_that_exists_submits_nothing(self, cluster: Cluster, run: Run, tmp_path: Path) -> None:
        reference = publish_fetched(tmp_path)
        code, stdout, stderr = run("submit", "fetch", *TINY)
        assert (code, stdout) == (0, f"{reference}\n")
        assert "fetch: reusing base/tiny@sha256:" in stderr
        assert cluster.requests == []

    def test_a_missing_input_is_said_before_anything_is_created(self, cluster: Cluster, run: Run) -> None:
        code, _, stderr = run("submit", "merge", *TINY)
        assert code == 2
        assert "merge needs base" in stderr
        assert cluster.requests == []


class TestFollowing:
    def test_cut_connections_lose_no_line_and_repeat_none(self, cluster: Cluster, run: Run) -> None:
        cluster.faults += [
            Fault("GET", "/log", times=2, cut_after=150),
            Fault("GET", "/log", times=1, status=500),
            Fault("GET", "pods?", times=2, cut_after=40),
            Fault("GET", "jobs?", times=2, cut_after=10),
        ]

        def play(job: Json) -> None:
            pod = cluster.start_pod(job)
            for number in range(40):
                cluster.write(pod, f"line {number}.", stamp="2026-01-01T00:00:00.5Z" if number < 20 else None)
                time.sleep(0.02)
            cluster.write(pod, REFERENCE)
            cluster.end_pod(pod, 0)
            cluster.end_job(job["metadata"]["name"], "Complete")

        playing(cluster, play)
        code, stdout, stderr = run("submit", "fetch", *TINY)
        assert (code, stdout) == (0, f"{REFERENCE}\n")
        assert [line for line in stderr.splitlines() if line.startswith("line ")] == [
            f"line {number}." for number in range(40)
        ]

    def test_a_watch_too_old_lists_again(self, cluster: Cluster, run: Run) -> None:
        def play(job: Json) -> None:
            cluster.faults += [
                Fault("GET", "jobs?", 1, cut_after=300),
                Fault("GET", "pods?", 1, cut_after=300),
            ]
            cluster.forget()
            finish(cluster, job, REFERENCE)

        playing(cluster, play)
        assert run("submit", "fetch", *TINY)[:2] == (0, f"{REFERENCE}\n")

    def test_without_the_right_to_read_events_and_logs_the_result_is_still_known(
        self, cluster: Cluster, run: Run
    ) -> None:
        cluster.denied |= {("list", "events"), ("get", "pods/log"), ("list", "nodes"), ("get", "secrets")}
        playing(cluster, lambda job: finish(cluster, job, "unseen"))
        code, stdout, stderr = run("submit", "fetch", *TINY)
        assert (code, stdout) == (0, "base/tiny\n")
        assert "going on without its events: missing right: list events in namespace lab" in stderr
        assert "missing right: get pods/log" in stderr

    def test_a_job_that_somebody_deletes_ends_it(self, cluster: Cluster, run: Run) -> None:
        def play(job: Json) -> None:
            cluster.start_pod(job)
            time.sleep(0.4)
            cluster.remove("jobs", job["metadata"]["name"])

        playing(cluster, play)
        code, _, stderr = run("submit", "fetch", *TINY)
        assert code == 143
        assert "was deleted before it had ended" in stderr


POD = Callable[[Cluster, Json], Any]


def unscheduled(message: str) -> POD:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return lambda cluster, job: cluster.pending_pod(job, [condition])


def waiting(reason: str, message: str) -> POD:
    return lambda cluster, job: cluster.start_pod(
        job, state={"waiting": {"reason": reason, "message": message}}
    )


def refused(message: str) -> POD:
    text = f'Error creating: pods "x-abcde" is forbidden: {message}'
    return lambda cluster, job: cluster.event(job, "FailedCreate", text)


def unmounted(cluster: Cluster, job: Json) -> None:
    pod = cluster.get("pods", waiting("ContainerCreating", "")(cluster, job))
    assert pod
    message = 'MountVolume.SetUp failed for volume "credentials" : secret "tunemill-store" not found'
    cluster.event(pod, "FailedMount", message)


PENDING = {
    "no-gpu-free": (
        unscheduled(
            "0/2 nodes are available: 2 Insufficient nvidia.com/gpu. preemption: 0/2 nodes are available"
        ),
        "no node has 1 GPU free, the largest, big, has 4 in all: 0/2 nodes are available: 2 Insufficient",
    ),
    "no-memory": (
        unscheduled("0/2 nodes are available: 2 Insufficient memory."),
        "no node takes its pod: 0/2",
    ),
    "volume": (
        unscheduled(
            "0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims. preemption: no"
        ),
        "its volume is not bound",
    ),
    "first-pull": (waiting("ErrImagePull", "dial tcp: timeout"), "cannot be pulled: dial tcp: timeout"),
    "quota": (
        refused("exceeded quota: lab, requested: pods=1"),
        "the namespace's quota is used up: lab, requested",
    ),
}
HOPELESS = {
    "image": (
        waiting("ImagePullBackOff", 'Back-off pulling image "registry.example/tunemill/train": not found'),
        r"the image registry.example/tunemill/train@sha256:a{64} cannot be pulled: Back-off",
    ),
    "config": (
        waiting("CreateContainerConfigError", 'secret "tunemill-store" not found'),
        "its container cannot start: secret",
    ),
    "secret": (unmounted, 'a volume cannot be mounted: .*secret "tunemill-store" not found'),
    "pod-security": (
        refused('violates PodSecurity "restricted:latest": runAsNonRoot != true'),
        'Pod Security refuses its pods: "restricted:latest": runAsNonRoot',
    ),
}


class TestWhyItWaits:
    @pytest.fixture(autouse=True)
    def gpus(self, cluster: Cluster, settings: Settings, run: Run) -> None:
        cluster.put("nodes", {"metadata": {"name": "small"}, "status": {"allocatable": {"cpu": "4"}}})
        cluster.put(
            "nodes", {"metadata": {"name": "big"}, "status": {"allocatable": {"nvidia.com/gpu": "4"}}}
        )
        settings(gpu={"resource": "nvidia.com/gpu", "count": 4}, store=None)

    @pytest.mark.parametrize(
        ("pend", "line"), [pytest.param(*found, id=name) for name, found in PENDING.items()]
    )
    def test_it_says_so_in_one_line_and_stays(self, cluster: Cluster, run: Run, pend: POD, line: str) -> None:
        def play(job: Json) -> None:
            pend(cluster, job)
            time.sleep(1.5)
            for pod in cluster.names("pods"):
                cluster.remove("pods", pod)
            finish(cluster, job, REFERENCE)

        playing(cluster, play)
        code, _, stderr = run("submit", "train", *TINY)
        assert code == 0, stderr
        said = [text for text in stderr.splitlines() if text.startswith("waiting: ")]
        assert len(said) == 1
        assert line in said[0]

    @pytest.mark.parametrize(
        ("pend", "line"), [pytest.param(*found, id=name) for name, found in HOPELESS.items()]
    )
    def test_what_only_a_person_can_put_right_ends_it_and_leaves_the_job(
        self, cluster: Cluster, run: Run, pend: POD, line: str
    ) -> None:
        playing(cluster, lambda job: pend(cluster, job))
        code, stdout, stderr = run("submit", "train", *TINY)
        (name,) = cluster.names("jobs")
        assert (code, stdout) == (78, "")
        last = stderr.splitlines()[-1]
        assert re.search(line, last), last
        assert last.endswith(f"tunemill cancel {name}")

    def test_a_secret_that_came_late_is_no_reason_any_more(self, cluster: Cluster, run: Run) -> None:
        def play(job: Json) -> None:
            unmounted(cluster, job)
            (name,) = cluster.names("pods")
            pod = cluster.get("pods", name)
            assert pod
            cluster.event(pod, "Pulling", "Pulling image", "Normal")
            time.sleep(1.5)
            cluster.remove("pods", name)
            finish(cluster, job, REFERENCE)

        playing(cluster, play)
        code, _, stderr = run("submit", "train", *TINY)
        assert code == 0, stderr
        assert "Pulling: Pulling image" in stderr

    def test_a_suspended_queue_is_quoted(self, cluster: Cluster, run: Run, settings: Settings) -> None:
        cluster.kueue = True
        cluster.put("localqueues", {"metadata": {"name": "gpu"}})
        settings(queue="gpu", store=None)
        message = "couldn't assign flavors to pod set main: insufficient unused quota, 1 more needed"

        def play(job: Json) -> None:
            condition = {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": message}
            labels = {"kueue.x-k8s.io/job-uid": job["metadata"]["uid"]}
            cluster.put(
                "workloads",
                {"metadata": {"name": "w", "labels": labels}, "status": {"conditions": [condition]}},
            )
            time.sleep(1)
            cluster.change("jobs", job["metadata"]["name"], lambda job: job["spec"].update(suspend=False))
            finish(cluster, job, REFERENCE)

        playing(cluster, play)
        code, _, stderr = run("submit", "train", *TINY)
        assert code == 0, stderr
        assert f"waiting: it waits in the queue gpu: {message}" in stderr

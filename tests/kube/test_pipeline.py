"""``submit pipeline``: from here, and by a driver in the cluster with the rights that its Role gives."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from apiserver import Cluster, Json
from tunemill import cli
from tunemill.kube import api
from tunemill.kube.driver import RULES

Run = Callable[..., tuple[int, str, str]]
PIPELINE = ("submit", "pipeline", "--model", "tiny", "--task", "stdlib", "--quant", "F16")
STAGES = ["fetch", "prepare", "train", "merge", "convert", "infer", "evaluate"]


def finish(cluster: Cluster, job: Json, failing: str | None = None) -> None:
    stage = job["metadata"]["labels"]["app.kubernetes.io/component"]
    if stage == "pipeline":
        return
    pod = cluster.start_pod(job)
    cluster.write(pod, f"this is {stage}", f"lab/{stage}@sha256:{'c' * 64}")
    cluster.end_pod(pod, 65 if stage == failing else 0)
    cluster.end_job(job["metadata"]["name"], "Failed" if stage == failing else "Complete", announced=False)


def playing(cluster: Cluster, failing: str | None = None) -> None:
    def play(job: Json) -> None:
        threading.Thread(target=finish, args=(cluster, job, failing), daemon=True).start()

    cluster.on_create = play


def stages(cluster: Cluster) -> list[str]:
    return [name.split("-")[0] for name in cluster.names("jobs")]


@pytest.fixture(autouse=True)
def unseen_store(settings: Callable[..., Path], run: Run) -> None:
    settings(store={"url": "s3://lab/x", "endpoint": "http://127.0.0.1:1"})


def test_every_stage_in_its_order(cluster: Cluster, run: Run) -> None:
    playing(cluster)
    code, stdout, stderr = run(*PIPELINE)
    assert code == 0, stderr
    assert stdout == f"lab/evaluate@sha256:{'c' * 64}\n"
    assert stages(cluster) == STAGES
    infer = next(name for name in cluster.names("jobs") if name.startswith("infer"))
    job = cluster.get("jobs", infer)
    assert job
    words = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert words[words.index("--set") + 1] == "quant=F16"


def test_the_first_failure_ends_it_with_its_code(cluster: Cluster, run: Run) -> None:
    playing(cluster, failing="train")
    code, stdout, stderr = run(*PIPELINE)
    assert (code, stdout) == (65, "")
    assert stages(cluster) == ["fetch", "prepare", "train"]
    assert "failed with exit code 65" in stderr


class TestShards:
    INFER = ("submit", "infer", "--model", "tiny", "--task", "stdlib", "--set", "quant=F16")

    def test_each_pod_takes_its_own_and_a_job_joins_them(self, cluster: Cluster, run: Run) -> None:
        playing(cluster)
        code, stdout, stderr = run(*self.INFER, "--shards", "3")
        assert code == 0, stderr
        assert stdout == f"lab/join@sha256:{'c' * 64}\n"
        scattered, join = (cluster.get("jobs", name) for name in cluster.names("jobs"))
        assert scattered
        assert join
        spec = scattered["spec"]
        assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
        container = spec["template"]["spec"]["containers"][0]
        assert container["args"][-1] == "shard_index=$(JOB_COMPLETION_INDEX)"
        for job in (scattered, join):
            container = job["spec"]["template"]["spec"]["containers"][0]
            assert {"name": "SHARDS", "value": "3"} in container["env"]
            assert "shard_count=$(SHARDS)" in container["args"]
            assert container["args"][0] == "infer"

    def test_the_component_alone_decides_their_number(
        self, cluster: Cluster, run: Run, settings: Callable[..., Path]
    ) -> None:
        settings(components=["shards"], store=None)
        playing(cluster)
        assert run(*self.INFER)[0] == 0
        assert [name.split("-")[0] for name in cluster.names("jobs")] == ["infer", "join"]

    def test_other_stages_have_none(self, run: Run) -> None:
        code, _, stderr = run("submit", "train", "--model", "tiny", "--task", "stdlib", "--shards", "2")
        assert code == 2
        assert "--shards is for infer" in stderr


def submitted_driver(cluster: Cluster, run: Run) -> tuple[Json, list[Json]]:
    code, stdout, stderr = run(*PIPELINE, "--in-cluster", "--detach")
    assert code == 0, stderr
    job, files = cluster.get("jobs", stdout.strip()), cluster.get("configmaps", stdout.strip())
    assert job
    assert files
    assert files["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
    return job, json.loads(files["data"]["jobs.json"])


def test_a_driver_has_the_least_rights_and_no_key(cluster: Cluster, run: Run) -> None:
    job, steps = submitted_driver(cluster, run)
    assert [step["metadata"]["labels"]["app.kubernetes.io/component"] for step in steps] == STAGES
    role = cluster.get("roles", "tunemill-driver")
    assert role
    verbs = {(verb, kind) for rule in role["rules"] for kind in rule["resources"] for verb in rule["verbs"]}
    assert verbs == {
        *(("create", "jobs"), ("get", "jobs"), ("list", "jobs"), ("watch", "jobs")),
        *(("get", "pods"), ("list", "pods"), ("watch", "pods"), ("get", "pods/log")),
        *(("list", "events"), ("watch", "events")),
    }
    pod = job["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["serviceAccountName"] == "tunemill-driver"
    assert "tunemill-store" not in json.dumps(pod)
    assert pod["containers"][0]["image"].startswith("registry.example/tunemill/store@sha256:")
    deadlines = [step["spec"]["activeDeadlineSeconds"] for step in steps]
    assert job["spec"]["activeDeadlineSeconds"] == sum(deadlines)


def test_submitting_a_running_driver_again_follows_it(cluster: Cluster, run: Run) -> None:
    job, steps = submitted_driver(cluster, run)
    cluster.start_pod(job)
    again, same_steps = submitted_driver(cluster, run)
    assert again["metadata"]["uid"] == job["metadata"]["uid"]
    assert [step["metadata"]["name"] for step in same_steps] == [step["metadata"]["name"] for step in steps]


def test_the_files_of_a_deleted_driver_are_waited_for(cluster: Cluster, run: Run) -> None:
    job, before = submitted_driver(cluster, run)
    name = job["metadata"]["name"]
    cluster.end_job(name, "Failed", "BackoffLimitExceeded", "", announced=False)
    threading.Timer(3, cluster.remove, ("configmaps", name)).start()  # as the collector does, some time later
    again, steps = submitted_driver(cluster, run)
    assert again["metadata"]["uid"] != job["metadata"]["uid"]
    assert steps[0]["metadata"]["name"] != before[0]["metadata"]["name"]


class TestDriving:
    """What the driver's pod runs, with no right that its Role does not give."""

    @pytest.fixture
    def drive(self, cluster: Cluster, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
        job, steps = submitted_driver(cluster, run)
        (tmp_path / "jobs.json").write_text(json.dumps(steps))
        monkeypatch.setenv("TUNEMILL_JOB", job["metadata"]["name"])
        monkeypatch.setenv("TUNEMILL_JOB_UID", job["metadata"]["uid"])
        monkeypatch.setenv("TUNEMILL_IMAGE_NAME", "store")
        given = {(verb, kind) for rule in RULES for kind in rule["resources"] for verb in rule["verbs"]}
        plurals = ("jobs", "pods", "pods/log", "events", "secrets", "configmaps", "nodes", "namespaces")
        every = {(verb, kind) for verb in ("create", "get", "list", "watch", "delete") for kind in plurals}
        cluster.denied |= every - given
        return lambda: run("submit", "pipeline", "--driver", str(tmp_path / "jobs.json"))

    def test_it_runs_all_and_owns_them(self, cluster: Cluster, drive: Run) -> None:
        playing(cluster)
        code, stdout, stderr = drive()
        assert (code, stdout) == (0, f"lab/evaluate@sha256:{'c' * 64}\n"), stderr
        names = [name for name in cluster.names("jobs") if not name.startswith("pipeline")]
        assert [name.split("-")[0] for name in names] == STAGES
        for name in names:
            job = cluster.get("jobs", name)
            assert job
            assert job["metadata"]["ownerReferences"][0]["kind"] == "Job"

    def test_started_again_it_goes_on(self, cluster: Cluster, drive: Run) -> None:
        playing(cluster, failing="prepare")
        assert drive()[0] == 65
        before = [path for method, path in cluster.requests if method == "POST" and path.count("/jobs")]
        playing(cluster)
        assert drive()[0] == 65
        assert stages(cluster) == ["pipeline", "fetch", "prepare"]
        assert before

    def test_outside_its_pod_it_refuses(self, drive: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TUNEMILL_JOB_UID")
        code, _, stderr = drive()
        assert code == 78
        assert "--driver is for the pod that" in stderr


def test_in_a_pod_the_token_of_its_account_is_used(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    begun = time.monotonic()
    with pytest.raises(api.ConfigurationError, match="this pod has no API token"):
        api.connect(None, None)
    assert time.monotonic() - begun < 5
    assert cli.BUG == 70

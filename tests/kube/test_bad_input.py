"""What can be wrong with a cluster, a file or a user: one line and its exit code each."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from apiserver import Cluster, Fault, status

from .conftest import DIGEST, write_kubeconfig

Run = Callable[..., tuple[int, str, str]]
Settings = Callable[..., Path]
FETCH = ("submit", "fetch", "--model", "tiny", "--task", "stdlib", "--detach")
TRAIN = ("submit", "train", "--model", "tiny", "--task", "stdlib", "--detach")


def refused(run: Run, code: int, line: str, *words: str) -> None:
    """Check that a command ends with a code after one line that says it, whatever else was said before."""
    found, stdout, stderr = run(*words)
    assert (found, stdout) == (code, ""), stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("tunemill: ")
    assert line in last
    assert stderr.count("tunemill: ") == 1
    assert "Traceback" not in stderr


class TestReachingIt:
    def test_no_kubeconfig(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
        refused(run, 78, "there is no kubeconfig at", *FETCH)

    def test_an_unknown_context(self, cluster: Cluster, run: Run, settings: Settings) -> None:
        settings(context="mars")
        refused(run, 78, "gives no context 'mars'", *FETCH)

    @pytest.mark.parametrize("text", ["{", "[]", "", "clusters: 7"])
    def test_a_damaged_kubeconfig(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
    ) -> None:
        (tmp_path / "damaged").write_text(text)
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "damaged"))
        refused(run, 78, "damaged gives no cluster", *FETCH)

    def test_nobody_answers(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        write_kubeconfig(tmp_path / "config", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
        refused(run, 75, "does not answer", *FETCH)

    @pytest.mark.parametrize("token", ["expired", ""])
    def test_credentials_that_are_not_accepted(
        self, cluster: Cluster, run: Run, tmp_path: Path, token: str
    ) -> None:
        path = tmp_path / "kubeconfig"
        path.write_text(path.read_text().replace("token: good", f"token: '{token}'"))
        refused(run, 77, "missing or expired, log in again", *FETCH)

    def test_something_else_than_an_api_server(self, cluster: Cluster, run: Run) -> None:
        cluster.faults.append(Fault("GET", "/jobs/", 1, 404, {"hello": "world"}))
        cluster.faults.append(Fault("GET", "/namespaces/lab", 1, 404, {"hello": "world"}))
        refused(run, 78, "there is no namespace 'lab'", *FETCH)


class TestTryingAgain:
    @pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
    def test_what_passes_by_itself_is_tried_again(self, cluster: Cluster, run: Run, code: int) -> None:
        cluster.faults.append(Fault("GET", "/jobs/", 2, code, headers={"Retry-After": "1"}))
        begun = len(cluster.requests)
        assert run(*FETCH)[0] == 0
        assert len([path for _, path in cluster.requests[begun:] if "/jobs/" in path]) == 3

    @pytest.mark.parametrize("code", [429, 503])
    def test_and_given_up_in_the_end(self, cluster: Cluster, run: Run, code: int) -> None:
        cluster.faults.append(Fault("GET", "/jobs/", 1000, code))
        refused(run, 75, f"answers {code}: told to answer {code}; tried for 3 s", *FETCH)

    def test_a_dropped_connection_is_made_again(self, cluster: Cluster, run: Run) -> None:
        cluster.faults.append(Fault("GET", "/jobs/", 2))
        assert run(*FETCH)[0] == 0

    def test_another_writer_of_the_quota_is_waited_for(self, cluster: Cluster, run: Run) -> None:
        conflict = status(409, "Conflict", "Operation cannot be fulfilled on resourcequotas")
        cluster.faults.append(Fault("POST", "/jobs", 1, 409, conflict))
        assert run(*FETCH)[0] == 0


class TestRights:
    @pytest.mark.parametrize(("verb", "plural"), [("get", "jobs"), ("create", "jobs")])
    def test_a_missing_one_is_named(self, cluster: Cluster, run: Run, verb: str, plural: str) -> None:
        cluster.denied.add((verb, plural))
        refused(run, 77, f"missing right: {verb} {plural}.batch in namespace lab", *FETCH)

    def test_to_delete(self, cluster: Cluster, run: Run) -> None:
        name = run(*FETCH)[1].strip()
        cluster.denied.add(("delete", "jobs"))
        refused(run, 77, "missing right: delete jobs.batch in namespace lab", "cancel", name)

    def test_to_make_the_account(self, cluster: Cluster, run: Run) -> None:
        cluster.denied.add(("create", "serviceaccounts"))
        refused(run, 77, "missing right: create serviceaccounts in namespace lab", *FETCH)

    def test_to_make_a_policy_is_not_needed(self, cluster: Cluster, run: Run) -> None:
        cluster.denied.add(("create", "networkpolicies"))
        code, _, stderr = run(*FETCH)
        assert code == 0
        assert "without its network policy: missing right: create networkpolicies" in stderr

    def test_a_kubeconfig_whose_login_program_fails_is_anonymous(self, cluster: Cluster, run: Run) -> None:
        body = status(
            403,
            "Forbidden",
            'jobs is forbidden: User "system:anonymous" cannot get resource "jobs" '
            'in API group "batch" in the namespace "lab"',
        )
        cluster.faults.append(Fault("GET", "/jobs/", 1, 403, body))
        refused(run, 77, "got no credentials from this kubeconfig", *FETCH)

    def test_a_policy_of_the_cluster_is_quoted(self, cluster: Cluster, run: Run) -> None:
        body = status(403, "Forbidden", 'admission webhook "policy" denied the request: no owner label')
        cluster.faults.append(Fault("POST", "/jobs", 1, 403, body))
        refused(run, 78, 'admission webhook "policy" denied the request: no owner label', *FETCH)

    def test_a_quota_of_jobs(self, cluster: Cluster, run: Run) -> None:
        message = 'jobs.batch "x" is forbidden: exceeded quota: lab, requested: count/jobs.batch=1'
        cluster.faults.append(Fault("POST", "/jobs", 1, 403, status(403, "Forbidden", message)))
        refused(run, 75, "the namespace's quota is used up", *FETCH)


class TestWhatTheClusterLacks:
    def test_the_namespace(self, cluster: Cluster, run: Run, settings: Settings) -> None:
        settings(namespace="mars")
        refused(run, 78, "there is no namespace 'mars'", *FETCH)

    def test_the_secret(self, cluster: Cluster, run: Run) -> None:
        cluster.remove("secrets", "tunemill-store")
        refused(run, 78, "there is no secret 'tunemill-store' in namespace lab: make it from", *FETCH)
        assert cluster.names("jobs") == []

    def test_the_cache(self, cluster: Cluster, run: Run, settings: Settings) -> None:
        settings(cacheVolume="scratch")
        refused(run, 78, "there is no persistentvolumeclaim 'scratch'", *FETCH)

    def test_kueue(self, cluster: Cluster, run: Run, settings: Settings) -> None:
        settings(queue="gpu")
        refused(run, 78, "the queue 'gpu' is unknown: this cluster has no Kueue", *FETCH)

    def test_the_queue(self, cluster: Cluster, run: Run, settings: Settings) -> None:
        cluster.kueue = True
        for name in ("cpu", "all"):
            cluster.put("localqueues", {"metadata": {"name": name}})
        settings(queue="gpu")
        refused(run, 78, "there is no queue 'gpu' in namespace lab: it has cpu, all", *FETCH)

    def test_so_many_gpus(self, cluster: Cluster, run: Run, settings: Settings) -> None:
        settings(store=None)
        for name, number in (("small", "1"), ("big", "4")):
            cluster.put(
                "nodes", {"metadata": {"name": name}, "status": {"allocatable": {"nvidia.com/gpu": number}}}
            )
        line = "8 GPUs are more than any node has: the largest, big, has 4 (nvidia.com/gpu)"
        refused(run, 78, line, *TRAIN, "--gpus", "8")
        assert cluster.names("jobs") == []

    def test_nodes_that_come_on_demand_count(self, cluster: Cluster, run: Run, settings: Settings) -> None:
        settings(gpu={"count": 8}, store=None)
        code, _, stderr = run(*TRAIN, "--gpus", "8")
        assert code == 0, stderr
        refused(run, 78, "16 GPUs are more than any node has: the largest has 8", *TRAIN, "--gpus", "16")

    def test_a_field_that_the_server_does_not_know(
        self, cluster: Cluster, run: Run, tmp_path: Path, settings: Settings
    ) -> None:
        overlay = tmp_path / "overlay"
        overlay.mkdir()
        base = Path(__file__).parents[2] / "k8s/base"
        patch = '[{"op": "add", "path": "/spec/parallelismus", "value": 1}]'
        (overlay / "kustomization.yaml").write_text(
            f"resources: [{os.path.relpath(base, overlay)}]\n"
            f"patches:\n  - target: {{kind: Job}}\n    patch: '{patch}'\n"
        )
        settings(overlay=str(overlay))
        refused(run, 78, "strict decoding error", *FETCH)
        assert cluster.names("jobs") == []


class TestFiles:
    def test_no_cluster_file(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "cluster.yaml").unlink()
        refused(run, 78, "'tunemill cluster init' writes it", *FETCH)

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            pytest.param("a: [", "is not YAML", id="syntax"),
            pytest.param("- a", "has to be a mapping", id="list"),
            pytest.param("quueue: x", "quueue: extra inputs are not permitted", id="key"),
            pytest.param(
                "gpu: {count: -1}", "gpu.count: input should be greater than or equal to 0", id="value"
            ),
        ],
    )
    def test_a_damaged_one(self, run: Run, tmp_path: Path, text: str, line: str) -> None:
        (tmp_path / "cluster.yaml").write_text(text)
        refused(run, 78, line, *FETCH)

    @pytest.mark.parametrize(
        "given", [{}, {"prepare": None}, {"prepare": "1.2.3"}, {"prepare": "sha256:abc"}]
    )
    def test_an_image_without_a_digest(
        self, run: Run, settings: Settings, given: dict[str, str | None]
    ) -> None:
        settings(images={name: value for name, value in given.items() if value})
        refused(
            run,
            78,
            "images.prepare in cluster.yaml has no digest (sha256:…): 'docker buildx imagetools",
            *FETCH,
        )

    def test_a_gpu_takes_the_image_with_cuda(self, run: Run, settings: Settings) -> None:
        settings(images={"train": DIGEST}, store=None)
        refused(run, 78, "images.train-cuda in cluster.yaml has no digest", *TRAIN, "--gpus", "1")

    def test_no_kubectl(self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        refused(run, 78, "kubectl is not installed here", *FETCH)

    def test_no_overlay(self, run: Run, settings: Settings) -> None:
        settings(overlay="nowhere")
        refused(run, 78, "nowhere has no kustomization.yaml", *FETCH)

    def test_no_component(self, run: Run, settings: Settings) -> None:
        settings(components=["warp"])
        refused(run, 78, "there is no 'warp' beside", *FETCH)


class TestWords:
    @pytest.mark.parametrize(
        ("words", "line"),
        [
            pytest.param(("fly",), "'fly' is not one of", id="stage"),
            pytest.param(
                ("fetch", "--model", "tini"), "unknown model 'tini': did you mean tiny?", id="model"
            ),
            pytest.param(("fetch", "--model", "tiny", "--gpus", "-1"), "-1 is not in the range", id="gpus"),
            pytest.param(
                ("fetch", "--model", "tiny", "--memory", "lots"), "'lots' is no amount of memory", id="memory"
            ),
            pytest.param(
                ("train", "--model", "tiny", "--task", "stdlib", "--set", "method=x"), "(flag)", id="value"
            ),
            pytest.param(
                ("fetch", "--model", "tiny", "--quant", "F16"), "--quant is for pipeline", id="quant"
            ),
            pytest.param(
                ("fetch", "--model", "tiny", "--in-cluster"), "--in-cluster is for pipeline", id="driver"
            ),
            pytest.param(("pipeline", "--model", "tiny", "--detach"), "add --in-cluster", id="detach"),
            pytest.param(
                ("pipeline", "--model", "tiny", "--input", "a=b"), "--input belongs to one stage", id="input"
            ),
        ],
    )
    def test_what_makes_no_sense(self, run: Run, words: tuple[str, ...], line: str) -> None:
        refused(run, 2, line, "submit", *words)

    @pytest.mark.parametrize("command", ["logs", "wait", "cancel", "status"])
    def test_an_unknown_job(self, cluster: Cluster, run: Run, command: str) -> None:
        refused(run, 2, "there is no Job 'x' in namespace lab", command, "x")

"""``status``, ``logs``, ``wait``, ``cancel`` and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from apiserver import Cluster

Run = Callable[..., tuple[int, str, str]]
FETCH = ("submit", "fetch", "--model", "tiny", "--task", "stdlib")
REFERENCE = f"base/tiny@sha256:{'b' * 64}"


@pytest.fixture
def job(cluster: Cluster, run: Run) -> str:
    code, stdout, stderr = run(*FETCH, "--detach")
    assert code == 0, stderr
    return stdout.strip()


def start(cluster: Cluster, name: str) -> str:
    job = cluster.get("jobs", name)
    assert job
    return cluster.start_pod(job)


class TestStatus:
    def test_nothing_is_said_on_stderr(self, cluster: Cluster, run: Run) -> None:
        code, stdout, stderr = run("status")
        assert (code, stdout) == (0, "")
        assert "there are no Jobs of Tunemill in namespace lab" in stderr

    def test_a_row_for_each(self, cluster: Cluster, run: Run, job: str) -> None:
        job_object = cluster.get("jobs", job)
        assert job_object
        cluster.event(
            job_object, "FailedCreate", 'Error creating: pods "x" is forbidden: exceeded quota: lab'
        )
        code, stdout, _ = run("status")
        assert code == 0
        assert f"{job}  waiting" in stdout
        assert "the namespace's quota is used up" in stdout

    def test_a_failed_one_tells_its_code(self, cluster: Cluster, run: Run, job: str) -> None:
        cluster.end_pod(start(cluster, job), 65)
        cluster.end_job(job, "Failed", "PodFailurePolicy", "", announced=False)
        code, stdout, _ = run("status", job, "--json")
        record = json.loads(stdout)
        assert code == 0
        assert (record["state"], record["exit_code"]) == ("failed (65)", 65)
        assert record["output"] == "base/tiny"

    def test_a_job_that_only_announces_its_end_still_runs(self, cluster: Cluster, run: Run, job: str) -> None:
        ending = {"type": "SuccessCriteriaMet", "status": "True"}
        cluster.change("jobs", job, lambda found: found.update(status={"conditions": [ending]}))
        assert json.loads(run("status", job, "--json")[1])["exit_code"] is None


class TestLogs:
    def test_of_the_newest_pod(self, cluster: Cluster, run: Run, job: str) -> None:
        cluster.write(start(cluster, job), "one", "two")
        assert run("logs", job)[:2] == (0, "one\ntwo\n")

    def test_before_it_has_started(self, cluster: Cluster, run: Run, job: str) -> None:
        code, stdout, stderr = run("logs", job)
        assert (code, stdout) == (0, "")
        assert f"'tunemill status {job}' says why" in stderr

    def test_followed_to_the_end_of_a_failure(self, cluster: Cluster, run: Run, job: str) -> None:
        pod = start(cluster, job)
        cluster.write(pod, "tunemill: bad data")
        cluster.end_pod(pod, 65)
        cluster.end_job(job, "Failed", "PodFailurePolicy", "", announced=False)
        code, stdout, stderr = run("logs", "-f", job)
        assert (code, stdout) == (65, "")
        assert "tunemill: bad data" in stderr


class TestWait:
    def test_it_ends_with_the_job_and_shows_no_log(self, cluster: Cluster, run: Run, job: str) -> None:
        def play() -> None:
            pod = start(cluster, job)
            cluster.write(pod, "hidden", REFERENCE)
            time.sleep(0.5)
            cluster.end_pod(pod, 0)
            cluster.end_job(job, "Complete")

        threading.Thread(target=play, daemon=True).start()
        code, stdout, stderr = run("wait", job)
        assert (code, stdout) == (0, "base/tiny\n")
        assert "hidden" not in stderr


class TestCancel:
    def test_the_job_is_deleted_in_the_background(self, cluster: Cluster, run: Run, job: str) -> None:
        code, stdout, stderr = run("cancel", job)
        assert (code, stdout) == (0, "")
        assert f"{job} is being ended" in stderr
        assert cluster.names("jobs") == []


@pytest.mark.parametrize("command", ["submit", "logs"])
def test_ctrl_c_detaches_and_ends_no_job(cluster: Cluster, job: str, tmp_path: Path, command: str) -> None:
    start(cluster, job)
    words = list(FETCH) if command == "submit" else ["logs", "-f", job]
    child = subprocess.Popen(
        [sys.executable, "-m", "tunemill.cli", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline and not any("/log" in path for _, path in cluster.requests):
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=20)
    assert (child.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-1] == f"tunemill: detached; {job} goes on: tunemill logs -f {job}"
    assert cluster.names("jobs") == [job]
    assert not any(method == "DELETE" for method, _ in cluster.requests)

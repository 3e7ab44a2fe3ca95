"""Containers killed and a server that goes away: nothing half-done is seen, and running again completes."""

from __future__ import annotations

import json
import random
import subprocess
import time

import pytest

from .conftest import Lab, run

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS = 6
WORDS = (
    *("--model", "tiny", "--task", "stdlib", "--run", "killed", "--store", "s3://tunemill"),
    *("--set", "num_hidden_layers=1", "--set", "pretrain_epochs=0.05", "--set", "max_steps=6"),
    *("--set", "per_device_train_batch_size=4", "--set", "save_steps=2", "--set", "seed=7"),
)
DONE_OR_RETRY = (0, 75)


def verified(lab: Lab) -> int:
    """Verify every artifact that the store shows; return how many there are."""
    names = [row["name"] for row in json.loads(lab.stage("store", "ls", "--json").stdout)]
    lab.stage("store", "verify", *names)
    return len(names)


def test_stages_killed_at_random_moments(lab: Lab) -> None:
    chance = random.Random(20261121)
    killed = set()
    for _ in range(KILLS):
        pipeline = lab.start("pipeline.sh", *WORDS)
        wait_for_a_container(lab, pipeline)
        time.sleep(chance.uniform(0.2, 9))
        for container in lab.containers():
            killed.add(container.split("-")[3])
            run("docker", "kill", container, check=False)
        pipeline.communicate(timeout=300)
    assert killed, "no container was ever running"
    verified(lab)
    done = lab.script("pipeline.sh", *WORDS)
    assert "killed/report-q4_k_m@sha256:" in done.stdout
    assert verified(lab) >= 8


def wait_for_a_container(lab: Lab, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not lab.containers():
        time.sleep(0.1)


def test_the_server_goes_away_in_mid_transfer_and_comes_back(lab: Lab) -> None:
    (lab.files / "large").mkdir()
    chance = random.Random(1)
    with (lab.files / "large/texts.txt").open("wb") as output:
        for _ in range(300):
            output.write(chance.randbytes(1 << 20))
    push = lab.start("run.sh", "store", "push", "/files/large", "faults/large", "--kind", "base")
    wait_for_a_container(lab, push)
    time.sleep(4)
    run("docker", "kill", lab.server)
    time.sleep(5)
    started_again(lab)
    _, errors = push.communicate(timeout=600)
    assert push.returncode in DONE_OR_RETRY, errors[-2000:]
    if push.returncode:
        assert errors.strip().splitlines()[-1].startswith("tunemill: ")
        lab.stage("store", "push", "/files/large", "faults/large", "--kind", "base")
    lab.stage("store", "verify", "faults/large")
    lab.stage("store", "doctor")


def started_again(lab: Lab) -> None:
    """The server with its data, as its restart policy or `make up` brings it back."""
    run("docker", "start", lab.server)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        state = run("docker", "inspect", "--format", "{{.State.Health.Status}}", lab.server).stdout.strip()
        if state == "healthy":
            return
        time.sleep(0.5)
    pytest.fail("the server did not come back")


def test_a_volume_that_is_full(lab: Lab) -> None:
    (lab.files / "texts").mkdir()
    (lab.files / "texts/texts.txt").write_bytes(b"0123456789abcdef" * (8 << 16))
    lab.stage("store", "push", "/files/texts", "faults/texts", "--kind", "base")
    done = run(
        *("docker", "run", "--rm", "--read-only", "--cap-drop", "ALL", "--network", f"{lab.project}_store"),
        *(
            "--tmpfs",
            "/work:size=1m,uid=65532,gid=65532",
            "--volume",
            f"{lab.project}_credentials:/run/secrets:ro",
        ),
        *(
            "--env",
            "AWS_SHARED_CREDENTIALS_FILE=/run/secrets/credentials",
            "--env",
            "AWS_DEFAULT_REGION=us-east-1",
        ),
        *("--env", "AWS_ENDPOINT_URL_S3=http://s3:7070", "--env", "TUNEMILL_STORE=s3://tunemill"),
        *("tunemill/store:test", "store", "pull", "faults/texts", "/work/texts"),
        check=False,
    )
    assert done.returncode == 75
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "space" in done.stderr


def test_a_server_that_is_down_from_the_start(lab: Lab) -> None:
    run("docker", "stop", lab.server)
    try:
        done = lab.stage("store", "ls", check=False)
        assert done.returncode == 75
        assert done.stderr == "compose: the store is down: start it by 'make up'\n"
    finally:
        started_again(lab)
    assert verified(lab) > 0

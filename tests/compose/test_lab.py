"""Real containers: what a stage sees, what it may do, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess

import pytest

from .conftest import ROOT, Lab, answer

pytestmark = pytest.mark.docker


def test_what_a_stage_is_and_sees(up: Lab) -> None:
    done = up.run("run.sh", "fetch", "--model", "mine.yaml")
    assert done.returncode == 0, done.stderr
    seen = done.stdout.splitlines()
    assert "arguments fetch --model mine.yaml" in seen
    assert "65532" in seen
    assert "learning_rate: 1" in seen
    assert "work is writable" in seen
    assert any("Read-only file system" in line for line in seen)
    assert "TUNEMILL_STORE=s3://tunemill" in seen
    assert "AWS_ENDPOINT_URL_S3=http://s3:7070" in seen
    assert any(re.fullmatch(r"TUNEMILL_IMAGE=tunemill/prepare@sha256:[0-9a-f]{64}", line) for line in seen)
    credentials = (up.folder / "secrets/credentials").read_text()
    assert credentials in done.stdout
    assert up.containers == []


def test_no_inspection_shows_a_key(up: Lab) -> None:
    keys = re.findall(r"= (\w+)", (up.folder / "secrets/credentials").read_text())
    project = up.environment["COMPOSE_PROJECT_NAME"]
    shown = answer("docker", "inspect", f"{project}-s3-1")
    assert shown
    assert len(keys) == 2
    assert not any(key in shown for key in keys)


@pytest.mark.parametrize("code", [0, 2, 65, 75])
def test_the_exit_code_is_the_stage_s(up: Lab, code: int) -> None:
    assert up.run("run.sh", "merge", f"code={code}").returncode == code


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [
        pytest.param(signal.SIGTERM, 143, "stopped", id="term"),
        pytest.param(signal.SIGHUP, 143, "stopped", id="terminal-closed"),
        pytest.param(signal.SIGINT, 130, "interrupted", id="ctrl-c"),
    ],
)
def test_a_signal_reaches_the_stage(up: Lab, sent: signal.Signals, code: int, said: str) -> None:
    launcher = up.start("train", "wait")
    assert launcher.stdout
    assert launcher.stdout.readline() == "ready\n"
    launcher.send_signal(sent)
    _, errors = launcher.communicate(timeout=60)
    assert (launcher.returncode, said in errors) == (code, True)
    assert up.containers == []


def test_a_client_that_is_killed_leaves_no_stage_behind(up: Lab) -> None:
    launcher = up.start("merge", "wait")
    assert launcher.stdout
    assert launcher.stdout.readline() == "ready\n"
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    for child in children:
        subprocess.run(["kill", "-9", child], check=False)
    launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert up.containers == []


@pytest.mark.parametrize(
    ("sent", "to_all"),
    [
        pytest.param(signal.SIGINT, True, id="ctrl-c"),
        pytest.param(signal.SIGTERM, False, id="term"),
        pytest.param(signal.SIGKILL, False, id="kill"),
    ],
)
def test_a_make_that_is_ended_leaves_no_stage_behind(up: Lab, sent: signal.Signals, to_all: bool) -> None:
    make = subprocess.Popen(
        ["make", "-s", "-f", ROOT / "Makefile", "merge", "WHERE=compose", "ARGS=wait"],
        cwd=up.folder.parent,
        env=up.environment | {"TUNEMILL_FILES": str(up.files)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert make.stdout
    assert make.stdout.readline() == "ready\n"
    os.killpg(make.pid, sent) if to_all else make.send_signal(sent)
    rest, _ = make.communicate(timeout=60)  # until the launcher, which holds stdout too, has ended
    assert (make.returncode != 0, rest) == (True, "")
    assert up.containers == []


def test_a_hub_token_reaches_the_stages_that_fetch(up: Lab) -> None:
    token = up.folder / "secrets/hub-token"
    token.write_text("a token\n")
    token.chmod(0o600)
    done = up.run("run.sh", "fetch")
    assert "HF_TOKEN_PATH=/run/secrets/hub-token" in done.stdout
    assert "\na token\n" in done.stdout


def test_the_store_survives_down_and_goes_when_it_is_asked_for(images: Lab) -> None:
    project = images.environment["COMPOSE_PROJECT_NAME"]
    assert images.run("up.sh").returncode == 0
    before = (images.folder / "secrets/credentials").read_bytes()
    launcher = images.start("convert", "wait")
    assert launcher.stdout
    assert launcher.stdout.readline() == "ready\n"
    assert images.run("down.sh", "--timeout", "5").returncode == 0
    launcher.communicate(timeout=60)
    assert (launcher.returncode, images.containers) == (143, [])  # no stage outlives the lab
    assert f"{project}_store" in volumes(project)
    assert images.run("up.sh").returncode == 0
    assert (images.folder / "secrets/credentials").read_bytes() == before
    assert images.run("down.sh", "--volumes", "--timeout", "1").returncode == 0
    assert volumes(project) == []


def test_up_fails_with_an_unfit_server(images: Lab) -> None:
    done = images.run("up.sh", AWS_DEFAULT_REGION="unfit")
    assert done.returncode == 78
    assert done.stderr.strip().splitlines()[-1] == "tunemill: not fit"


def test_the_pipeline_runs_every_stage_in_order_and_brings_the_report(up: Lab) -> None:
    done = up.run("pipeline.sh", "--model", "tiny", "--quant", "f16,Q4_K_M", "--set", "seed=7")
    assert done.returncode == 0, done.stderr
    ran = [line.removeprefix("== ") for line in done.stderr.splitlines() if line.startswith("== ")]
    shared = ["fetch", "prepare", "train", "merge", "convert"]
    assert ran == [*shared, "infer", "evaluate", "quantize", "infer", "evaluate"]
    assert "arguments quantize --model tiny --set seed=7 --set quant=Q4_K_M" in done.stdout
    for quant in ("F16", "Q4_K_M"):
        page = up.files / f".tunemill/reports/tiny-stdlib-{quant}/report.html"
        assert page.read_text() == f"<p>tiny-stdlib/report-{quant}@sha256:0\n"
        assert f"report: {page.relative_to(up.files)}" in done.stdout


def test_the_pipeline_stops_where_a_stage_fails(up: Lab) -> None:
    done = up.run("pipeline.sh", "code=65")
    assert done.returncode == 65
    assert done.stderr.strip().splitlines() == ["== fetch"]


def volumes(project: str) -> list[str]:
    return (answer("docker", "volume", "ls", "-q", "--filter", f"name=^{project}_") or "").split()

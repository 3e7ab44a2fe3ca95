"""WHERE decides what a target runs, and an unknown place is refused."""

from __future__ import annotations

import subprocess

import pytest

from .conftest import ROOT, clean_environment


def make(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "-C", str(ROOT), "--no-print-directory", *words],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_unknown_place_is_one_line_and_a_usage_error() -> None:
    done = make("pipeline", "WHERE=mars")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "WHERE=mars" in line
    assert "local" in line
    assert "compose" in line


@pytest.mark.parametrize(
    "stage", ["fetch", "prepare", "train", "merge", "convert", "imatrix", "quantize", "infer", "evaluate"]
)
def test_in_compose_a_stage_goes_through_the_launcher_and_needs_nothing_installed(stage: str) -> None:
    shown = make("-n", stage, "WHERE=compose", "MODEL=mine.yaml", "SET=seed=7").stdout
    assert f"compose/run.sh {stage} --model mine.yaml" in shown
    assert "--store s3://tunemill" in shown
    assert "--set 'seed=7'" in shown
    assert "pip install" not in shown


def test_in_compose_the_pipeline_and_the_demo_take_the_words_of_the_local_ones() -> None:
    for target in ("pipeline", "demo"):
        local = make("-n", target, "STORE=s3://b/p").stdout.strip().splitlines()
        compose = make("-n", target, "STORE=s3://b/p", "WHERE=compose").stdout.strip().splitlines()
        words = [line.split("pipeline", 1)[1] for line in local if "tunemill pipeline" in line]
        assert [line.split("compose/pipeline.sh", 1)[1] for line in compose if "pipeline.sh" in line] == words


def test_pull_sees_the_lab_s_store_from_this_machine() -> None:
    assert "compose/host.sh .venv/bin/tunemill" in make("-n", "pull", "WHERE=compose").stdout
    assert "compose/host.sh" not in make("-n", "pull").stdout

"""The tiny pipeline, stage by stage in its containers, through a real S3 server.

Shortened, since what passes between the containers is the point. Each container is what compose/ makes of
it: uid 65532, read-only root, no capability, and no network but the store's.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from .conftest import IMAGES, Lab, ancestors, inspect, run

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(3600)]

WORDS = ("--model", "tiny", "--task", "stdlib", "--store", "s3://tunemill")
SHORT = (
    *("--set", "num_hidden_layers=1", "--set", "pretrain_epochs=0.1", "--set", "max_steps=4"),
    *("--set", "per_device_train_batch_size=4", "--set", "save_steps=2"),
)
NATIVE = ("train", "merge", "convert", "quantize", "infer", "evaluate")


@pytest.fixture(scope="module")
def finished(lab: Lab) -> Lab:
    """The lab after the pipeline."""
    done = lab.script("pipeline.sh", *WORDS, *SHORT, "--quant", "Q4_K_M")
    assert "tiny-stdlib/report-q4_k_m@sha256:" in done.stdout
    return lab


@pytest.fixture(scope="module")
def lineage(finished: Lab) -> dict[str, object]:
    shown = finished.stage("store", "log", "tiny-stdlib/report-q4_k_m", "--json").stdout
    tree: dict[str, object] = json.loads(shown)
    return tree


def test_the_lineage_names_every_image(lineage: dict[str, object]) -> None:
    made = ancestors(lineage)
    assert set(made) == {"fetch", "prepare", "train", "merge", "convert", "quantize", "infer", "evaluate"}
    expected = {"fetch": "prepare", "evaluate": "infer"}
    for stage, artifact in made.items():
        image = f"tunemill/{expected.get(stage, stage)}"
        assert artifact["image"] == f"{image}@{inspect(f'{image}:test')['Id']}"


def test_the_labels_equal_those_without_containers(finished: Lab, tmp_path: Path) -> None:
    """From the same base and data, since the texts are those of the Python that runs."""
    inputs = {
        "train": ("base", "data"),
        "merge": ("base",),
        "convert": ("data",),
        "infer": ("data",),
        "evaluate": ("data",),
    }
    references = {"base": "base/tiny", "data": "tiny-stdlib/data"}
    for stage in NATIVE:
        given = [f"--input={role}={references[role]}" for role in inputs.get(stage, ())]
        native(finished, tmp_path, stage, *WORDS, *SHORT, "--run", "native", *given)
    containers, alone = (predictions(finished, tmp_path, project) for project in ("tiny-stdlib", "native"))
    assert len(alone) > 500
    assert containers == alone


def native(lab: Lab, work: Path, *words: str) -> None:
    """Run the command line of this environment on the lab's store, with a cache of its own."""
    done = subprocess.run(
        [lab.folder / "host.sh", sys.executable, "-m", "tunemill.cli", *words],
        cwd=work,
        env={**os.environ, **lab.environment, "TUNEMILL_CACHE": str(work / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def predictions(lab: Lab, work: Path, project: str) -> dict[str, str]:
    """Predicted label by row."""
    target = work / project
    native(
        lab, work, "store", "pull", f"{project}/predictions-q4_k_m", str(target), "--store", "s3://tunemill"
    )
    rows = pyarrow.parquet.read_table(target / "predictions.parquet").to_pylist()
    return {row["id"]: row["label"] for row in rows}


def test_a_stage_reaches_the_store_and_nothing_else(finished: Lab) -> None:
    with socket.create_server(("0.0.0.0", 0)) as outside:
        port = outside.getsockname()[1]
        assert reached(finished, "published", port) == ["s3", "outside"]  # a network with a way out
        assert reached(finished, "store", port) == ["s3"]


def reached(lab: Lab, network: str, port: int) -> list[str]:
    """What a container on one of the lab's networks can connect to: the store, and this machine's address."""
    code = (
        "import socket\n"
        f"for name, place in (('s3', ('s3', 7070)), ('outside', ('{own_address()}', {port}))):\n"
        "    try:\n"
        "        socket.create_connection(place, timeout=3).close(); print(name)\n"
        "    except OSError: pass\n"
    )
    command = ("docker", "run", "--rm", "--network", f"{lab.project}_{network}", "--entrypoint", "python")
    return run(*command, "tunemill/merge:test", "-c", code).stdout.split()


def own_address() -> str:
    """This machine's address on the network that its default route is on; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.254", 9))
        return str(probe.getsockname()[0])


def test_again_everything_is_reused(finished: Lab) -> None:
    again = finished.script("pipeline.sh", *WORDS, *SHORT, "--quant", "Q4_K_M")
    assert again.stderr.count("reusing ") == len(IMAGES) + 1
    assert finished.containers() == []


def test_the_report_is_where_a_person_finds_it(finished: Lab) -> None:
    page = finished.files / ".tunemill/reports/tiny-stdlib-q4_k_m/report.html"
    assert "<html" in page.read_text()


def test_the_finished_model_is_pulled_to_the_host(finished: Lab, tmp_path: Path) -> None:
    words = ("--model", "tiny", "--task", "stdlib", "--quant", "Q4_K_M", "--store", "s3://tunemill")
    native(finished, tmp_path, "pull", *words)
    assert len(list(tmp_path.glob("models/*/*.gguf"))) == 1

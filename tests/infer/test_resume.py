"""Kills at real moments, and what the journal makes of what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from tunemill.infer.predict import predict
from tunemill.infer.rows import Answer, Blocks, Row

Make = Callable[..., Any]

CHILD = """
import sys, threading
from pathlib import Path
from tunemill.infer.config import InferConfig
from tunemill.infer.predict import predict
from tunemill.progress import Progress
from tunemill.work import Input, Work
gguf, data, output, scratch = map(Path, sys.argv[1:5])
inputs = {role: Input(role, role * 2, role, path, {}) for role, path in (("gguf", gguf), ("data", data))}
output.mkdir(exist_ok=True)
config = InferConfig(**SETTINGS)
predict(Work(config, inputs, output, scratch, Progress(quiet=True), None, threading.Event()))
"""


def kill_after(shards: int, extra: float, command: list[str], scratch: Path) -> bool:
    """Run the stage and kill it a moment after so many shards exist; tell whether it was killed."""
    child = subprocess.Popen(command)
    wanted = scratch / "blocks" / f"{shards:06d}.parquet"
    while child.poll() is None and not wanted.exists():
        time.sleep(0.002)
    time.sleep(extra)
    os.kill(child.pid, signal.SIGKILL)
    return child.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        pytest.param("label", {"block_rows": 8, "n_threads": 1}, id="labels"),
        pytest.param(
            "text",
            {"block_rows": 8, "n_threads": 1, "temperature": 1.0, "max_new_tokens": 12},
            id="free-answers",
        ),
    ],
)
def test_killed_again_and_again_the_file_is_the_same(
    micro: Any, dataset: Make, make_work: Make, labelled: Make, tmp_path: Path, form: str, settings: Any
) -> None:
    data = dataset(labelled(120), () if form == "text" else ("networking", "data", "files"), form)
    for other in ("net services", "data types"):
        table = pyarrow.parquet.read_table(data / "test.parquet")
        kept = table.filter([label != other for label in table["label"].to_pylist()])
        pyarrow.parquet.write_table(kept, data / "test.parquet")
    whole = make_work(micro.gguf.parent, data, "whole", **settings)
    predict(whole)
    output, scratch = tmp_path / "output", tmp_path / "scratch"
    scratch.mkdir()
    program = CHILD.replace("SETTINGS", repr(settings))
    command = [sys.executable, "-c", program, *map(str, (micro.gguf.parent, data, output, scratch))]
    kills = 0
    for shards, extra in ((0, 0.0), (2, 0.001), (4, 0.003), (6, 0.007)):
        kills += kill_after(shards, extra, command, scratch)
        journal = (scratch / "blocks" / "journal.jsonl").read_text().splitlines()
        assert len(journal) - 1 >= shards  # at most the shard under way is lost
        assert not (output / "predictions.parquet").exists() or shards == 6
    assert kills >= 3
    subprocess.run(command, check=True)
    for name in ("predictions.parquet", "labels.json", "run.json"):
        assert (output / name).read_bytes() == (whole.output / name).read_bytes()


ROWS = [Row(f"row-{n}", f"text {n}", (), "data") for n in range(4)]
ANSWERS = [Answer("data", 1.0, (1.0, 0.0)), Answer(error="empty text")] * 2


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    shards = Blocks(tmp_path / "blocks", {"seed": 1})
    for _ in range(3):
        shards.add(ROWS, ANSWERS)
    return tmp_path / "blocks"


def test_finished_shards_are_found_again(saved: Path, tmp_path: Path) -> None:
    again = Blocks(saved, {"seed": 1})
    assert again.finished == 3
    again.join(tmp_path / "all.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "all.parquet")
    assert table["id"].to_pylist() == [row.id for row in ROWS] * 3
    assert table["error"].to_pylist() == [None, "empty text"] * 6


def test_shards_of_another_run_are_thrown_away(saved: Path) -> None:
    assert Blocks(saved, {"seed": 2}).finished == 0
    assert not (saved / "000000.parquet").exists()


def tear(saved: Path) -> None:
    path = saved / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-9])


def garble(saved: Path) -> None:
    lines = (saved / "journal.jsonl").read_text().splitlines()
    (saved / "journal.jsonl").write_text("\n".join([*lines[:3], "{]"]) + "\n")


def reorder(saved: Path) -> None:
    lines = (saved / "journal.jsonl").read_text().splitlines()
    (saved / "journal.jsonl").write_text("\n".join([*lines[:3], json.dumps({"shard": 5})]) + "\n")


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        pytest.param(tear, 2, id="torn-line"),
        pytest.param(garble, 2, id="not-json"),
        pytest.param(reorder, 2, id="wrong-shard"),
        pytest.param(lambda saved: (saved / "000001.parquet").unlink(), 1, id="missing-shard"),
        pytest.param(lambda saved: (saved / "000000.parquet").write_bytes(b"PAR1"), 0, id="damaged-shard"),
        pytest.param(lambda saved: (saved / "journal.jsonl").unlink(), 0, id="no-journal"),
        pytest.param(lambda saved: (saved / "journal.jsonl").write_bytes(b""), 0, id="empty-journal"),
    ],
)
def test_damage_costs_only_what_comes_after(saved: Path, damage: Callable[[Path], Any], left: int) -> None:
    damage(saved)
    shards = Blocks(saved, {"seed": 1})
    assert shards.finished == left
    shards.add(ROWS, ANSWERS)
    assert Blocks(saved, {"seed": 1}).finished == left + 1

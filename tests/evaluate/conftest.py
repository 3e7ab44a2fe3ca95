"""Artifacts as infer and prepare leave them, made by hand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tunemill.evaluate.config import EvaluateConfig
from tunemill.progress import Progress
from tunemill.work import Input, Work

SUBJECTS = {
    "files": "open read path file",
    "nets": "socket host port send",
    "texts": "string split join word",
}


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Thirty judged rows over three labels: 20 right, 8 wrong, 2 without an answer."""
    made = []
    labels = list(SUBJECTS)
    for number in range(30):
        gold = labels[number % 3]
        answer = gold if number < 20 else labels[(number + 1) % 3]
        failed = number >= 28
        shares = [0.8 if label == answer else 0.1 for label in labels]
        made.append(
            {
                "id": f"row-{number}",
                "text": f"{SUBJECTS[gold]} <b>{number}</b>",
                "label": None if failed else answer,
                "probability": None if failed else 0.8,
                "gold": gold,
                "probabilities": None if failed else shares,
                "error": "empty text" if failed else None,
            }
        )
    return made


@pytest.fixture
def write_inputs(tmp_path: Path) -> Callable[..., Path]:
    """Write both input artifacts under a directory and return it."""

    def write(
        rows: Sequence[Mapping[str, Any]],
        labels: Sequence[str] = tuple(SUBJECTS),
        groups: Sequence[int] | None = None,
        training: int = 30,
        **task: Any,
    ) -> Path:
        predictions, data = tmp_path / "predictions", tmp_path / "data"
        for directory in (predictions, data):
            directory.mkdir(exist_ok=True)
        listed = json.dumps([{"name": label, "code": None} for label in labels])
        (predictions / "labels.json").write_text(listed)
        (predictions / "task.json").write_text(json.dumps({"form": "label" if labels else "text", **task}))
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist([dict(row) for row in rows]), predictions / "predictions.parquet"
        )
        held_out = {
            "id": [row["id"] for row in rows],
            "text": [row["text"] for row in rows],
            "label": [row["gold"] for row in rows],
            "group": list(groups or range(len(rows))),
        }
        pyarrow.parquet.write_table(pyarrow.table(held_out), data / "test.parquet")
        if training:
            names = [list(SUBJECTS)[n % 3 if n % 10 else 0] for n in range(training)]
            train = {
                "id": [f"train-{n}" for n in range(training)],
                "text": [f"{SUBJECTS[name]} number {n}" for n, name in enumerate(names)],
                "label": names,
                "group": list(range(training)),
            }
            pyarrow.parquet.write_table(pyarrow.table(train), data / "train.parquet")
        return tmp_path

    return write


@pytest.fixture
def make_work(tmp_path: Path) -> Callable[..., Work[EvaluateConfig]]:
    """Build what the harness gives the stage."""

    def make(inputs: Path, **settings: Any) -> Work[EvaluateConfig]:
        output = tmp_path / "output"
        output.mkdir()
        given = {
            role: Input(f"tiny-parts/{role}@sha256:{'0' * 64}", role, role, inputs / role, {"rows": 30})
            for role in ("predictions", "data")
        }
        checkpoints: Any = None  # this stage saves no states
        config = EvaluateConfig(**settings)
        quiet = Progress(quiet=True)
        return Work(config, given, output, tmp_path, quiet, checkpoints, threading.Event())

    return make

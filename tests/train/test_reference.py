"""Probes of every form of task: chosen, saved, and read again by the stages after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import micro
import pytest
from transformers import AutoTokenizer

from tunemill.parity.probes import Probes
from tunemill.prompting import read_prompting
from tunemill.train.reference import choose_probes


@pytest.mark.parametrize(
    ("form", "labels", "dimensions"),
    [
        pytest.param("label", 3, ["shade"], id="label-of-a-dimension"),
        pytest.param("labels", 0, [], id="several-labels"),
    ],
)
def test_probes_have_labels_where_every_answer_is_one(
    base: Path, tmp_path: Path, form: str, labels: int, dimensions: list[str]
) -> None:
    answers = ["red", "green", "blue"] if form == "label" else ["red", "green; blue", "blue; red"]
    rows: list[dict[str, Any]] = [micro.row(n, "rose", answers[n % 3]) for n in range(12)]
    data = micro.make_data(tmp_path / "data", validation=rows)
    (data / "labels.json").write_text(json.dumps([{"name": name} for name in ("red", "green", "blue")]))
    (data / "task.json").write_text(json.dumps({"form": form, "dimensions": dimensions, "max_labels": 2}))
    work = micro.make_work(tmp_path, base, data, parity_probes=6)
    chosen = choose_probes(work, read_prompting(base), AutoTokenizer.from_pretrained(base))
    assert chosen is not None
    chosen.save(tmp_path)
    loaded = Probes.load(tmp_path)
    assert loaded == chosen
    assert loaded.labels == labels
    assert {probe.answer.text.removesuffix("</s>").strip() for probe in loaded.probes} <= set(answers)

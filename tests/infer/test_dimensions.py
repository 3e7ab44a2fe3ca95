"""Texts rated on several dimensions, and contextual calibration, against direct computations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tunemill.errors import BadDataError, ConfigurationError
from tunemill.evaluate.baselines import Training
from tunemill.evaluate.config import EvaluateConfig
from tunemill.evaluate.evaluate import judge, read_clusters
from tunemill.evaluate.predictions import read_predictions
from tunemill.infer.calibration import Calibration
from tunemill.infer.predict import predict
from tunemill.infer.rows import Answer
from tunemill.progress import Progress
from tunemill.work import Input

LEVELS = ("a", "e", "o")  # of one token each, so that the model finds several of them likely
DIMENSIONS = ("hope", "ease of mind")
TEXTS = ["sort a list", "open the net", "read it all again"]
NOTHING = ["N/A", "[MASK]", ""]


def asked(text: str, dimension: str | None) -> list[dict[str, str]]:
    said = f"text: {text}" + (f" rate {dimension}" if dimension else "")
    return [{"role": "user", "content": said}]


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., Path]:
    """Write prepared data, of dimensions if there are any; ``texts`` become prompts as they are."""

    def write(name: str, dimensions: tuple[str, ...] = DIMENSIONS, texts: list[str] = TEXTS) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        pairs = [(text, dimension) for text in texts for dimension in dimensions or (None,)]
        columns: dict[str, Any] = {
            "id": [f"{texts.index(text)}/{dimension}" for text, dimension in pairs],
            "prompt": [asked(text, dimension) for text, dimension in pairs],
            "completion": [LEVELS[0]] * len(pairs),
            "text": [text or "nothing" for text, _ in pairs],
            "label": [LEVELS[0]] * len(pairs),
            "group": [texts.index(text) for text, _ in pairs],
        }
        if dimensions:
            columns["item"] = [str(texts.index(text)) for text, _ in pairs]
            columns["dimension"] = [dimension for _, dimension in pairs]
        pyarrow.parquet.write_table(pyarrow.table(columns), directory / "test.parquet")
        (directory / "labels.json").write_text(json.dumps([{"name": level} for level in LEVELS]))
        task = {"task": "mood", "form": "label", "ordered": True, "dimensions": list(dimensions)}
        (directory / "task.json").write_text(json.dumps(task))
        nothing = [
            {"dimension": dimension, "prompt": asked(text, dimension)}
            for text in NOTHING
            for dimension in dimensions or (None,)
        ]
        (directory / "content_free.json").write_text(json.dumps(nothing))
        return directory

    return write


def read(work: Any) -> list[dict[str, Any]]:
    return list(pyarrow.parquet.read_table(work.output / "predictions.parquet").to_pylist())


def test_every_row_says_which_text_and_dimension_it_is_about(micro: Any, data: Any, make_work: Any) -> None:
    work = make_work(micro.gguf.parent, data("rated"), quant="F16")
    predict(work)
    rows = read(work)
    assert [(row["item"], row["dimension"]) for row in rows] == [
        (str(number), dimension) for number in range(len(TEXTS)) for dimension in DIMENSIONS
    ]
    assert all(sum(row["probabilities"]) == pytest.approx(1) for row in rows)
    by_dimension = [np.array([row["probabilities"] for row in rows[place::2]]) for place in (0, 1)]
    assert np.abs(by_dimension[0] - by_dimension[1]).max() > 0.01  # else the dimension were not read


def test_texts_without_labels_are_predicted_as_others_and_have_no_gold(
    micro: Any, data: Any, make_work: Any
) -> None:
    directory = data("rated")
    table = pyarrow.parquet.read_table(directory / "test.parquet")
    nothing = {
        "label": pyarrow.nulls(len(table), pyarrow.string()),
        "completion": pyarrow.array([""] * len(table)),
    }
    for name, column in nothing.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    pyarrow.parquet.write_table(table, directory / "unlabelled.parquet")
    works = {
        split: make_work(micro.gguf.parent, directory, split, quant="F16", split=split)
        for split in ("test", "unlabelled")
    }
    for work in works.values():
        predict(work)
    found = read(works["unlabelled"])
    assert [row["gold"] for row in found] == [None] * len(table)
    assert [{**row, "gold": LEVELS[0]} for row in found] == read(works["test"])
    assert works["unlabelled"].config.naming() == {"shard": "-unlabelled"}


@pytest.mark.parametrize(
    "dimensions", [pytest.param(DIMENSIONS, id="dimensions"), pytest.param((), id="label")]
)
def test_calibrated_probabilities_are_divided_by_those_of_nothing(
    micro: Any, data: Any, make_work: Any, dimensions: tuple[str, ...]
) -> None:
    plain = make_work(micro.gguf.parent, data("plain", dimensions), "plain-out", quant="F16")
    nothing = make_work(micro.gguf.parent, data("nothing", dimensions, NOTHING), "nothing-out", quant="F16")
    directory = data("again", dimensions)
    calibrated = make_work(
        micro.gguf.parent, directory, "calibrated-out", quant="F16", calibration="contextual"
    )
    for work in (plain, nothing, calibrated):
        predict(work)
    bias: dict[str | None, Any] = {}
    for row in read(nothing):
        bias[row["dimension"]] = bias.get(row["dimension"], 0) + np.array(row["probabilities"]) / len(NOTHING)
    changed = 0
    for before, after in zip(read(plain), read(calibrated), strict=True):
        odds = np.array(before["probabilities"]) / bias[before["dimension"]]
        assert after["probabilities"] == pytest.approx((odds / odds.sum()).tolist(), abs=0.005)
        assert after["label"] == LEVELS[int(np.argmax(after["probabilities"]))]
        assert after["probability"] == max(after["probabilities"])
        changed += abs(after["probabilities"][0] - before["probabilities"][0]) > 0.05
    assert changed
    record = json.loads((calibrated.output / "run.json").read_text())
    assert record["config"]["calibration"] == "contextual"
    assert set(record["content_free"]) == set(dimensions or [""])
    for name, shares in record["content_free"].items():
        assert [shares[level] for level in LEVELS] == pytest.approx(bias[name or None].tolist(), abs=0.005)
    assert "content_free" not in json.loads((plain.output / "run.json").read_text())


def test_calibration_by_hand() -> None:
    calibration = Calibration(("a", "b"), {None: np.array([0.8, 0.2])})
    answer = calibration.applied(Answer("a", 0.6, (0.6, 0.4)), None)
    assert answer.label == "b"
    assert answer.probabilities == pytest.approx((0.75 / 2.75, 2 / 2.75))
    assert calibration.applied(Answer(error="empty text"), None) == Answer(error="empty text")


@pytest.mark.parametrize(
    ("file", "content", "error", "words"),
    [
        pytest.param(
            "task.json",
            '{"form": "labels"}',
            ConfigurationError,
            "answers are several labels: leave it out",
            id="form",
        ),
        pytest.param(
            "content_free.json", "[", BadDataError, "content_free.json.*run prepare again", id="damaged"
        ),
        pytest.param("content_free.json", "[]", BadDataError, "not about the task's dimensions", id="other"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_a_model_is_loaded(
    micro: Any, data: Any, make_work: Any, file: str, content: str, error: type[Exception], words: str
) -> None:
    directory = data("wrong")
    (directory / file).write_text(content)
    work = make_work(directory, directory, quant="F16", calibration="contextual")
    with pytest.raises(error, match=words) as found:
        predict(work)
    assert "\n" not in str(found.value)
    assert not list(work.output.iterdir())


def test_calibrated_shards_make_the_undivided_file(micro: Any, data: Any, make_work: Any) -> None:
    directory = data("rated")
    settings = {"quant": "F16", "calibration": "contextual", "block_rows": 2, "shard_count": 2}
    whole = make_work(micro.gguf.parent, directory, "whole", **{**settings, "shard_count": 1})
    parts = [make_work(micro.gguf.parent, directory, f"part-{n}", **settings, shard_index=n) for n in (0, 1)]
    for work in (whole, *parts):
        predict(work)
    joining = make_work(micro.gguf.parent, directory, "joined", **settings)
    shards = {
        f"shard-{n}": Input(f"shard-{n}", "0", "predictions", part.output, {}) for n, part in enumerate(parts)
    }
    predict(replace(joining, inputs=shards))
    for name in ("predictions.parquet", "run.json"):
        assert (joining.output / name).read_bytes() == (whole.output / name).read_bytes()


def test_evaluate_judges_each_dimension(micro: Any, data: Any, make_work: Any) -> None:
    directory = data("rated")
    work = make_work(micro.gguf.parent, directory, quant="F16")
    predict(work)
    predictions = read_predictions(work.output)
    clusters = read_clusters(directory, predictions)
    assert list(clusters) == [0, 0, 1, 1, 2, 2]
    found = judge(
        predictions, Training(), clusters, EvaluateConfig(bootstrap_rounds=100), Progress(quiet=True)
    )
    assert [rating.dimension for rating in found.ratings] == [None, *DIMENSIONS]
    assert [rating.rows for rating in found.ratings] == [6, 3, 3]
    right = [row["label"] == LEVELS[0] for row in read(work)]
    assert found.headlines[0].interval.value == np.mean(right)

"""Sets of labels against transformers' probabilities of every sequence that the task allows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tunemill.evaluate.baselines import Training
from tunemill.evaluate.config import EvaluateConfig
from tunemill.evaluate.evaluate import judge
from tunemill.evaluate.predictions import read_predictions
from tunemill.infer.model import Model
from tunemill.infer.predict import predict
from tunemill.progress import Progress
from tunemill.prompting import read_prompting
from tunemill.work import Work

SHARE = 0.005
"""Largest difference allowed in a probability: it follows from test_scores' 0.02 nats of each answer."""
LABELS = ("law", "art", "art and letters", "tin")
TEXTS = ["sort a list", "open the net and send", "read it", "other ends", "a day in the sun"]


@pytest.fixture
def data(dataset: Callable[..., Path]) -> Callable[..., Path]:
    """Write texts with one gold set each; ``most`` of the labels are allowed."""

    def write(most: int = 2, labels: tuple[str, ...] = LABELS, texts: list[str] = TEXTS) -> Path:
        directory = dataset([(text, f"{labels[0]}; {labels[1]}") for text in texts], labels, form="labels")
        table = pyarrow.parquet.read_table(directory / "test.parquet")
        gold = pyarrow.array([list(labels[:2])] * len(texts), pyarrow.list_(pyarrow.string()))
        pyarrow.parquet.write_table(table.append_column("labels", gold), directory / "test.parquet")
        task = {"task": "parts", "form": "labels", "max_labels": most, "separator": "; "}
        (directory / "task.json").write_text(json.dumps(task))
        return directory

    return write


@pytest.fixture(scope="module")
def model(micro: Any) -> Iterator[Model]:
    with Model(micro.gguf) as opened:
        yield opened


def brute_force(
    reference: Any, model: Model, gguf: Path, text: str, most: int
) -> dict[tuple[str, ...], float]:
    """Return the probability of every sequence, of all that the task allows."""
    import torch

    prompting = read_prompting(gguf)
    messages = [{"role": "user", "content": f"which part: {text}"}]
    begin = list(model.tokens(prompting.prompt(messages)))
    nats = {}
    for length in range(1, most + 1):
        for chosen in permutations(LABELS, length):
            end = list(model.tokens(prompting.completion(messages, "; ".join(chosen))))
            with torch.no_grad():
                logits = reference(torch.tensor([begin + end])).logits[0].double().log_softmax(-1)
            nats[chosen] = sum(float(logits[len(begin) - 1 + n, token]) for n, token in enumerate(end))
    shares = np.exp(np.array(list(nats.values())) - max(nats.values()))
    return dict(zip(nats, (shares / shares.sum()).tolist(), strict=True))


def run(work: Work[Any]) -> list[dict[str, Any]]:
    predict(work)
    return list(pyarrow.parquet.read_table(work.output / "predictions.parquet").to_pylist())


@pytest.mark.parametrize("most", [2, 3])
def test_probabilities_are_those_of_all_sequences(
    micro: Any, reference: Any, model: Model, data: Any, make_work: Any, most: int
) -> None:
    rows = run(make_work(micro.gguf.parent, data(most), max_pruned=0, quant="F16"))
    for row, text in zip(rows, TEXTS, strict=True):
        shares = brute_force(reference, model, micro.gguf.parent, text, most)
        sets: dict[frozenset[str], float] = {}
        for chosen, share in shares.items():
            sets[frozenset(chosen)] = sets.get(frozenset(chosen), 0) + share
        best = max(sets, key=sets.__getitem__)
        assert set(row["labels"]) == best
        assert row["label"] == "; ".join(row["labels"])
        assert shares[tuple(row["labels"])] == max(shares[c] for c in shares if frozenset(c) == best)
        assert row["probability"] == pytest.approx(sets[best], abs=SHARE)
        included = [sum(share for one, share in sets.items() if label in one) for label in LABELS]
        assert row["probabilities"] == pytest.approx(included, abs=SHARE)
        assert row["golds"] == ["law", "art"]
        assert row["pruned"] == 0


@pytest.mark.parametrize("allowed", [0.05, 0.3, 0.9])
def test_what_is_left_out_is_bounded(
    micro: Any, reference: Any, model: Model, data: Any, make_work: Any, allowed: float
) -> None:
    work = make_work(micro.gguf.parent, data(3), max_pruned=allowed, quant="F16")
    facts = predict(work)
    rows = pyarrow.parquet.read_table(work.output / "predictions.parquet").to_pylist()
    assert facts["most_pruned"] == max(row["pruned"] for row in rows)
    assert 0 < facts["most_pruned"] <= allowed
    assert json.loads((work.output / "run.json").read_text())["most_pruned"] == facts["most_pruned"]
    for row, text in zip(rows, TEXTS, strict=True):
        shares = brute_force(reference, model, micro.gguf.parent, text, 3)
        for label, found in zip(LABELS, row["probabilities"], strict=True):
            exact = sum(share for chosen, share in shares.items() if label in chosen)
            assert abs(found - exact) <= row["pruned"] + SHARE


def test_one_label_at_most_is_a_choice_of_one(micro: Any, data: Any, make_work: Any) -> None:
    several = run(make_work(micro.gguf.parent, data(1), "several", quant="F16"))
    directory = data(1)
    (directory / "task.json").write_text(json.dumps({"task": "parts", "form": "label"}))
    one = run(make_work(micro.gguf.parent, directory, "one", quant="F16"))
    assert [row["label"] for row in several] == [row["label"] for row in one]
    assert [row["probabilities"] for row in several] == [pytest.approx(row["probabilities"]) for row in one]


def test_the_batch_changes_no_byte_and_a_row_without_text_is_marked(
    micro: Any, data: Any, make_work: Any
) -> None:
    directory = data(3, texts=[*TEXTS, " "])
    files = []
    for name, settings in (
        ("one", {"n_batch": 256}),
        ("two", {"n_batch": 1024, "n_threads": 2, "n_parallel": 3}),
    ):
        work = make_work(micro.gguf.parent, directory, name, quant="F16", **settings)
        rows = run(work)
        files.append((work.output / "predictions.parquet").read_bytes())
    assert rows[-1]["error"] == "empty text"
    assert rows[-1]["labels"] is None
    assert files[0] == files[1]


def test_more_labels_than_sequences(micro: Any, data: Any, make_work: Any) -> None:
    """All pairs of 20 labels are 380 branches, more than llama.cpp has sequences."""
    labels = tuple(f"{first}{second} in" for first in "abcd" for second in "efghi")
    rows = run(make_work(micro.gguf.parent, data(2, labels, TEXTS[:1]), max_pruned=0, quant="F16"))
    assert 0.999 <= sum(rows[0]["probabilities"]) <= 2  # each set has one or two labels
    assert rows[0]["label"] in {"; ".join(chosen) for n in (1, 2) for chosen in permutations(labels, n)}


def test_evaluate_judges_sets(micro: Any, data: Any, make_work: Any) -> None:
    work = make_work(micro.gguf.parent, data(), quant="F16")
    predict(work)
    predictions = read_predictions(work.output)
    assert predictions.gold_sets == (LABELS[:2],) * len(TEXTS)
    config = EvaluateConfig(bootstrap_rounds=100)
    found = judge(predictions, Training(), np.arange(len(TEXTS)), config, Progress(quiet=True))
    overlap = {one.name: one.interval.value for one in found.headlines}["any_overlap"]
    assert overlap == np.mean([bool(set(LABELS[:2]) & set(one or ())) for one in predictions.answer_sets])
    assert found.calibration is not None
    assert found.calibration.rows == len(TEXTS) * len(LABELS)

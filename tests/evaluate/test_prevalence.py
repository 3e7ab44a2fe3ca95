"""Corrected prevalences: a published value, exact recovery, and what cannot be known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tunemill.evaluate.bootstrap import Bootstrap
from tunemill.evaluate.predictions import Predictions
from tunemill.evaluate.prevalence import prevalences, rogan_gladen, unmix
from tunemill.task import Task

LABELS = ("a", "b", "c")


def table(counts: dict[tuple[str, str], int], labels: tuple[str, ...] = LABELS) -> Predictions:
    """Return rows of pairs of gold and answer; a dot is a row without an answer."""
    pairs = [pair for pair, count in counts.items() for _ in range(count)]
    names = tuple(str(n) for n in range(len(pairs)))
    answers = tuple(None if answer == "." else answer for _, answer in pairs)
    errors = tuple("too long" if answer is None else None for answer in answers)
    return Predictions(Task("label", labels), names, names, tuple(gold for gold, _ in pairs), answers, errors)


def alone(given: Predictions, rounds: int = 300) -> Bootstrap:
    return Bootstrap(rounds, 0.95, 1, np.arange(len(given)))


JUDGED = table(
    {
        **{("a", "a"): 40, ("a", "b"): 5, ("a", "."): 5},
        **{("b", "a"): 10, ("b", "b"): 30},
        **{("c", "c"): 45, ("c", "b"): 5},
    }
)


def test_rogan_gladen_of_a_published_example() -> None:
    # epiR's manual, epi.prev: 23 of 150 cows positive, sensitivity 0.96, specificity 0.89: 5.1 of 100
    found = rogan_gladen(np.array([23 / 150]), np.array([0.96]), np.array([0.89]))
    assert round(100 * float(found[0]), 1) == 5.1


def test_shares_that_errors_have_mixed_are_recovered() -> None:
    # a corpus of 500 a, 400 b and 100 c on which the model errs exactly as on the judged rows
    corpus = table(
        {("?", "a"): 400 + 100, ("?", "b"): 50 + 300 + 10, ("?", "."): 50, ("?", "c"): 90},
    )
    found = prevalences(JUDGED, alone(JUDGED), corpus)
    assert (found.rows, found.corpus, found.method) == (1000, True, "confusion-matrix")
    assert [one.counted.value for one in found.labels] == pytest.approx([0.5, 0.36, 0.09])
    assert [one.corrected.value for one in found.labels] == pytest.approx([0.5, 0.4, 0.1], abs=1e-6)
    assert [one.gold for one in found.labels] == pytest.approx([50 / 140, 40 / 140, 50 / 140])
    for one in found.labels:
        assert 0 <= one.corrected.low < one.corrected.value < one.corrected.high <= 1
        # what is not known of the errors comes on top of what is not known of the corpus
        assert one.corrected.high - one.corrected.low > one.counted.high - one.counted.low


def test_of_two_labels_both_methods_are_one() -> None:
    observed, matrix = np.array([0.35, 0.65]), np.array([[0.9, 0.1], [0.2, 0.8]])
    expected = rogan_gladen(np.array([0.35]), np.array([0.9]), np.array([0.8]))[0]
    assert unmix(observed, matrix)[0] == pytest.approx(expected)


def test_shares_stay_between_zero_and_one() -> None:
    matrix = np.array([[0.9, 0.1], [0.2, 0.8]])
    assert unmix(np.array([0.95, 0.05]), matrix) == pytest.approx([1, 0])
    assert rogan_gladen(np.array([0.05]), np.array([0.9]), np.array([0.8]))[0] == 0


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    random = np.random.default_rng(11)
    matrix, truth, inside = np.array([[0.85, 0.15], [0.25, 0.75]]), 0.3, 0
    for seed in range(40):
        golds = random.choice(2, 150, p=[0.5, 0.5])
        judged = _drawn(golds, matrix, random)
        corpus = _drawn(random.choice(2, 600, p=[truth, 1 - truth]), matrix, random)
        one = prevalences(judged, Bootstrap(200, 0.95, seed, np.arange(150)), corpus).labels[0]
        inside += one.corrected.low <= truth <= one.corrected.high
        assert not one.counted.low <= truth - 0.1 <= one.counted.high
    assert inside >= 34  # of 40; with 95 % fewer come once in two hundred


def test_without_a_corpus_judged_rows_are_counted_and_nothing_is_corrected() -> None:
    found = prevalences(JUDGED, alone(JUDGED), None)
    assert (found.rows, found.corpus) == (140, False)
    assert {one.corrected for one in found.labels} == {None}
    assert found.labels[0].counted.value == pytest.approx(50 / 140)


def test_a_label_that_no_judged_row_has_is_taken_as_counted() -> None:
    judged = table({("a", "a"): 30, ("b", "b"): 30})
    found = prevalences(judged, alone(judged), table({("?", "a"): 20, ("?", "b"): 20, ("?", "c"): 10}))
    assert [one.corrected.value for one in found.labels] == pytest.approx([0.4, 0.4, 0.2], abs=1e-6)


def test_several_labels_are_corrected_one_by_one() -> None:
    task, names = Task("labels", ("a", "b"), 2), tuple(str(n) for n in range(100))
    golds = tuple(("a",) if n < 40 else ("b",) for n in range(100))
    answers = tuple(("a",) if n < 30 or n >= 94 else ("b",) for n in range(100))  # 30 of 40, and 6 of 60
    joined = tuple(labels[0] for labels in golds), tuple(labels[0] for labels in answers)
    judged = Predictions(task, names, names, *joined, (None,) * 100, gold_sets=golds, answer_sets=answers)
    corpus = replace(judged, golds=("",) * 100, gold_sets=())  # whose gold answers nobody knows
    found = prevalences(judged, alone(judged), corpus)
    assert found.method == "rogan-gladen"
    assert found.labels[0].counted.value == pytest.approx(0.36)
    assert found.labels[0].corrected.value == pytest.approx((0.36 + 0.9 - 1) / (0.75 + 0.9 - 1))


def test_each_dimension_is_corrected_by_its_own_errors() -> None:
    dimensions = ("hope", "trust")
    task = Task("label", ("low", "high"), ordered=True, dimensions=dimensions)
    names = tuple(f"{n}" for n in range(80))
    asked = tuple(dimensions[n % 2] for n in range(80))
    golds = tuple("low" if n < 40 else "high" for n in range(80))
    answers = tuple("high" if one == "trust" else gold for one, gold in zip(asked, golds, strict=True))
    judged = Predictions(task, names, names, golds, answers, (None,) * 80, items=names, dimensions=asked)
    found = prevalences(judged, alone(judged), judged)
    assert [(one.dimension, one.label) for one in found.labels] == [
        ("hope", "low"),
        ("hope", "high"),
        ("trust", "low"),
        ("trust", "high"),
    ]
    assert found.labels[0].corrected.value == pytest.approx(0.5)
    assert found.labels[2].counted.value == 0


def _drawn(golds: np.ndarray, matrix: np.ndarray, random: np.random.Generator) -> Predictions:
    answers = [random.choice(2, p=matrix[gold]) for gold in golds]
    names = tuple(str(n) for n in range(len(golds)))
    words = (tuple("ab"[one] for one in column) for column in (golds, answers))
    return Predictions(Task("label", ("a", "b")), names, names, *words, (None,) * len(golds))

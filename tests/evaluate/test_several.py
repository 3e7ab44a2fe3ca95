"""Figures of sets of labels, against scikit-learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics
from sklearn.preprocessing import MultiLabelBinarizer

from tunemill.errors import BadDataError
from tunemill.evaluate.baselines import Tfidf, Training, answer, majority
from tunemill.evaluate.bootstrap import Bootstrap
from tunemill.evaluate.figures import SeveralLabels
from tunemill.evaluate.predictions import Predictions, checked
from tunemill.evaluate.several import confusions, measures, several_labels
from tunemill.task import Task

LABELS = ("law", "health", "physics", "other")


def sets(golds: list[str], answers: list[str]) -> Predictions:
    """Return one row per word; a letter is a label's first, a dot a row without an answer."""
    names = {label[0]: label for label in LABELS}
    gold = tuple(tuple(names[letter] for letter in word) for word in golds)
    given = tuple(None if word == "." else tuple(names[letter] for letter in word) for word in answers)
    ids = tuple(str(number) for number in range(len(golds)))
    return Predictions(
        Task("labels", LABELS, 3),
        ids,
        ids,
        tuple("; ".join(labels) for labels in gold),
        tuple(None if labels is None else "; ".join(labels) for labels in given),
        tuple("too long" if labels is None else None for labels in given),
        gold_sets=gold,
        answer_sets=given,
    )


def judged(given: Predictions) -> SeveralLabels:
    bootstrap = Bootstrap(500, 0.95, 1, np.arange(len(given)))
    return several_labels(given, measures(given, bootstrap), bootstrap)


GOLDS = ["l", "lh", "hp", "o", "lho", "p", "h", "l"]
ANSWERS = ["l", "h", "hpo", "l", "lh", ".", "h", "ph"]


def test_figures_are_scikit_learns() -> None:
    given = sets(GOLDS, ANSWERS)
    found = judged(given)
    binarizer = MultiLabelBinarizer(classes=LABELS)
    gold = binarizer.fit_transform(given.gold_sets)
    answered = binarizer.transform([labels or () for labels in given.answer_sets])
    assert found.exact_match.value == metrics.accuracy_score(gold, answered)
    assert found.jaccard.value == pytest.approx(metrics.jaccard_score(gold, answered, average="samples"))
    for kind, value in (
        ("micro", found.micro_f1.value),
        ("macro", found.macro_f1.value),
        ("weighted", found.weighted_f1),
    ):
        assert value == pytest.approx(metrics.f1_score(gold, answered, average=kind))
    wanted = metrics.precision_recall_fscore_support(gold, answered, zero_division=0)
    for one, precision, recall, f1, support in zip(found.per_class, *wanted, strict=True):
        assert (one.precision, one.recall, one.f1, one.support) == (precision, recall, f1, support)
    assert [one.predicted for one in found.per_class] == list(answered.sum(axis=0))
    assert (found.errors, found.gold_size, found.predicted_size) == (1, 12 / 8, 11 / 8)


def test_any_overlap_is_right_if_one_true_label_is_among_those_predicted() -> None:
    found = judged(sets(GOLDS, ANSWERS))
    assert found.any_overlap.value == 5 / 8
    assert found.any_overlap.low < 5 / 8 < found.any_overlap.high


def test_confusions_are_labels_missed_where_wrong_ones_were_given() -> None:
    found = confusions(sets(["lh", "l", "l"], ["hp", "p", "h"]))
    assert [(one.gold, one.predicted, one.count, one.rows) for one in found] == [
        ("law", "physics", 2, (0, 1)),
        ("law", "health", 1, (2,)),
    ]
    assert found[0].share == pytest.approx(2 / 3)


def test_a_label_outside_the_set_or_given_twice_is_refused() -> None:
    given = sets(["l", "h"], ["l", "hh"])
    with pytest.raises(BadDataError, match="row 1 has a predicted label twice: health, health"):
        checked(given, "file")
    with pytest.raises(BadDataError, match="row 0 has the gold label 'sport', outside the set"):
        checked(replace(sets(["l"], ["l"]), gold_sets=(("sport",),)), "file")


def test_baselines_answer_with_sets() -> None:
    texts = tuple(f"{word} number {n}" for n in range(12) for word in ("court", "doctor", "court doctor"))
    labels = (("law",), ("health",), ("law", "health")) * 12
    training = Training(texts, labels, (None,) * 36)
    given = replace(sets(["l", "h"], ["l", "h"]), texts=("a court sat", "the doctor and the court"))
    learned = answer(Tfidf(1000, 1000, 3, True), training, given)
    assert learned is not None
    assert [set(one or ()) for one in learned.answer_sets] == [{"law"}, {"law", "health"}]
    commonest = answer(majority, training, given)
    assert commonest is not None
    assert commonest.answers == ("health", "health")
    assert learned.probabilities is None

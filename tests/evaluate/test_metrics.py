"""Figures against scikit-learn, known values and a published study's predictions."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from tunemill.evaluate import answers as free
from tunemill.evaluate.answers import exact, token_f1
from tunemill.evaluate.bootstrap import Bootstrap
from tunemill.evaluate.figures import Classification
from tunemill.evaluate.metrics import classification, confusions, measures
from tunemill.evaluate.predictions import Predictions
from tunemill.task import Task


def alone(rows: int, seed: int = 1, rounds: int = 2000) -> Bootstrap:
    return Bootstrap(rounds, 0.95, seed, np.arange(rows))


def predictions(golds: str, answers: str, labels: str = "abc", shares: object = None) -> Predictions:
    """One row per character; a dot is a row without an answer."""
    given = tuple(None if answer == "." else answer for answer in answers)
    names = tuple(str(number) for number in range(len(golds)))
    errors = tuple("too long" if answer is None else None for answer in given)
    probabilities = None if shares is None else np.array(shares, dtype=float)
    return Predictions(Task("label", tuple(labels)), names, names, tuple(golds), given, errors, probabilities)


def judged(given: Predictions, bootstrap: Bootstrap) -> Classification:
    return classification(given, measures(given, bootstrap), bootstrap)


GOLDS, ANSWERS = "aaaabbbbccca", "aabcbbba.cbc"


def test_figures_are_scikit_learns() -> None:
    found = judged(predictions(GOLDS, ANSWERS), alone(12))
    golds, answers = list(GOLDS), list(ANSWERS)
    assert found.accuracy.value == metrics.accuracy_score(golds, answers)
    assert found.balanced_accuracy.value == pytest.approx(
        metrics.recall_score(golds, answers, labels=list("abc"), average="macro")
    )
    for kind, value in (
        ("macro", found.macro_f1.value),
        ("micro", found.micro_f1),
        ("weighted", found.weighted_f1.value),
    ):
        assert value == pytest.approx(metrics.f1_score(golds, answers, labels=list("abc"), average=kind))
    for label, one in zip("abc", found.per_class, strict=True):
        assert one.precision == metrics.precision_score(golds, answers, labels=[label], average="macro")
        assert one.recall == metrics.recall_score(golds, answers, labels=[label], average="macro")
        assert (one.support, one.predicted) == (GOLDS.count(label), ANSWERS.count(label))


def test_rows_without_an_answer_count_as_wrong_and_have_a_column() -> None:
    found = judged(predictions("aab", "a.b", "ab"), alone(3))
    assert found.accuracy.value == pytest.approx(2 / 3)
    assert found.errors == 1
    assert found.matrix == ((1, 0, 1), (0, 1, 0))
    assert found.per_class[0].recall == 0.5
    assert found.per_class[0].precision == 1


def test_labels_that_never_occur_do_not_pull_averages_down() -> None:
    found = judged(predictions("ab", "ab", "abz"), alone(2))
    assert found.macro_f1.value == found.balanced_accuracy.value == 1
    assert [one.support for one in found.per_class] == [1, 1, 0]


def test_top_k_is_scikit_learns_where_every_row_has_an_answer() -> None:
    random = np.random.default_rng(3)
    shares = random.dirichlet(np.ones(6), 200)
    golds = "".join(random.choice(list("abcdef"), 200))
    answers = "".join("abcdef"[row.argmax()] for row in shares)
    found = judged(predictions(golds, answers, "abcdef", shares), alone(200))
    for k in (2, 3, 5):
        wanted = metrics.top_k_accuracy_score(list(golds), shares, k=k, labels=list("abcdef"))
        assert found.top[k] == pytest.approx(wanted)


def test_confusions_are_ranked_by_count() -> None:
    found = confusions(predictions("aaabbc", "bbcaab"))
    assert [(one.gold, one.predicted, one.count) for one in found] == [
        ("a", "b", 2),
        ("b", "a", 2),
        ("a", "c", 1),
        ("c", "b", 1),
    ]
    assert found[0].share == pytest.approx(2 / 3)


def test_interval_of_accuracy_is_close_to_the_binomial_one() -> None:
    found = judged(predictions("a" * 400, "a" * 300 + "b" * 100, "ab"), alone(400, rounds=8000))
    spread = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert found.accuracy.low == pytest.approx(0.75 - spread, abs=0.005)
    assert found.accuracy.high == pytest.approx(0.75 + spread, abs=0.005)


def test_rows_of_one_cluster_are_drawn_together() -> None:
    golds, answers = "a" * 400, "a" * 300 + "b" * 100
    clustered = Bootstrap(8000, 0.95, 1, np.arange(400) // 4)
    found = judged(predictions(golds, answers, "ab"), clustered)
    spread = 1.96 * (0.75 * 0.25 / 100) ** 0.5  # as if only every fourth row were there
    assert found.accuracy.high - found.accuracy.low == pytest.approx(2 * spread, abs=0.01)


def test_same_seed_same_interval() -> None:
    given = predictions(GOLDS * 9, ANSWERS * 9)
    assert judged(given, alone(108)) == judged(given, alone(108))
    assert judged(given, alone(108)).macro_f1 != judged(given, alone(108, seed=2)).macro_f1


@pytest.mark.parametrize(
    ("gold", "answer", "match", "f1"),
    [
        pytest.param("The cat, sat.", "the  Cat sat", True, 1.0, id="normalised"),
        pytest.param("a cat sat", "cat stood", False, 0.5, id="half"),
        pytest.param("cat cat", "cat", False, 2 / 3, id="repeated"),
        pytest.param("", "the", True, 1.0, id="both-empty"),
        pytest.param("cat", "", False, 0.0, id="one-empty"),
        pytest.param("12 %", "12", True, 1.0, id="punctuation"),
    ],
)
def test_free_answers_are_compared_as_in_squad(gold: str, answer: str, match: bool, f1: float) -> None:
    assert exact(gold, answer) is match
    assert token_f1(gold, answer) == pytest.approx(f1)


def test_free_answers_without_answer_score_nothing() -> None:
    task, names = Task("text"), ("1", "2")
    given = Predictions(task, names, names, ("red car", "blue"), ("red", None), (None, "empty"))
    found = free.free_answers(given, free.measures(given, alone(2)), alone(2))
    assert (found.exact_match.value, found.errors) == (0, 1)
    assert found.f1.value == pytest.approx((2 / 3) / 2)
    assert found.by_kind == ()


def test_figures_of_a_resample_are_scikit_learns_of_the_rows_it_takes() -> None:
    random = np.random.default_rng(6)
    golds = "".join(random.choice(list("abc"), 60))
    given = predictions(golds, "".join(one if random.random() < 0.6 else "b" for one in golds))
    bootstrap = Bootstrap(100, 0.95, 3, np.arange(60) // 2)
    measured = measures(given, bootstrap)
    for number, taken in enumerate(next(bootstrap.draws())[:5]):
        rows = np.repeat(np.arange(60), taken[bootstrap.clusters])
        gold, answer = ([column[row] for row in rows] for column in (given.golds, given.answers))
        wanted = {
            "accuracy": metrics.accuracy_score(gold, answer),
            "macro_f1": metrics.f1_score(gold, answer, average="macro"),
            "weighted_f1": metrics.f1_score(gold, answer, average="weighted"),
            "balanced_accuracy": metrics.balanced_accuracy_score(gold, answer),
            "cohen_kappa": metrics.cohen_kappa_score(gold, answer),
        }
        found = {name: float(measured[name].resampled[number]) for name in wanted}
        assert found == pytest.approx(wanted)

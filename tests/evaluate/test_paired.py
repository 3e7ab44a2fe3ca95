"""Two models on the same rows: McNemar's test against statsmodels, paired differences of every form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm, permutation_test
from statsmodels.stats.contingency_tables import mcnemar as mcnemar_of_rows
from statsmodels.stats.multitest import multipletests

from tunemill.errors import BadDataError
from tunemill.evaluate.bootstrap import Bootstrap
from tunemill.evaluate.metrics import measures
from tunemill.evaluate.paired import LEAST_P, TITLES, holm, mcnemar, paired
from tunemill.evaluate.predictions import Predictions
from tunemill.task import Task


def rows(answers: str, golds: str | None = None) -> Predictions:
    names = tuple(f"row {n}" for n in range(len(answers)))
    given = tuple(golds or "a" * len(answers))
    return Predictions(Task("label", ("a", "b")), names, names, given, tuple(answers), (None,) * len(answers))


def alone(count: int) -> Bootstrap:
    return Bootstrap(2000, 0.95, 1, np.arange(count))


# Agresti (1990), Categorical Data Analysis, table 10.1: 794 approve twice, 150 and 86 changed their minds.
FIRST = rows("a" * (794 + 150) + "b" * (86 + 570))
SECOND = rows("a" * 794 + "b" * 150 + "a" * 86 + "b" * 570)


def test_counts_and_p_value_of_a_published_table() -> None:
    found = paired(FIRST, SECOND, alone(1600))
    assert (found.rows, found.only_first, found.only_second) == (1600, 150, 86)
    assert found.p_value == pytest.approx(mcnemar_of_rows([[794, 150], [86, 570]], exact=True).pvalue)
    accuracy = found.differences[0]
    assert (accuracy.name, accuracy.title) == ("accuracy", "Accuracy")
    assert accuracy.interval.value == pytest.approx(64 / 1600)
    # Agresti gives 0.06 to 0.02 for the difference, from its standard error of 0.0095
    assert accuracy.interval.low == pytest.approx(0.04 - 1.96 * 0.0095, abs=0.002)
    assert accuracy.interval.high == pytest.approx(0.04 + 1.96 * 0.0095, abs=0.002)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 1), (3, 10), (40, 41), (3000, 1000)])
def test_clusters_of_one_row_give_the_test_of_rows(lost: int, gained: int) -> None:
    ahead = np.array([1] * gained + [-1] * lost + [0] * 5)
    expected = mcnemar_of_rows([[0, gained], [lost, 0]], exact=True).pvalue if lost + gained else 1
    assert mcnemar(ahead) == pytest.approx(expected, rel=1e-9, abs=0)


def test_a_clusters_rows_change_sides_together() -> None:
    random = np.random.default_rng(3)
    for _ in range(20):
        ahead = random.integers(-4, 6, 11)
        every_sign = permutation_test((ahead,), np.sum, permutation_type="samples", n_resamples=1 << 11)
        assert mcnemar(ahead) == pytest.approx(min(1, every_sign.pvalue))


def test_copies_of_a_text_are_no_evidence() -> None:
    first, second = rows("a" * 40), rows("b" * 30 + "a" * 10)
    once = paired(first, second, Bootstrap(50, 0.95, 1, np.arange(40) // 10))
    assert (once.only_first, once.only_second) == (30, 0)
    assert once.p_value == pytest.approx(2 * 0.5**3)  # three clusters of ten: three coins
    assert paired(first, second, alone(40)).p_value < 1e-8


def test_many_clusters_are_nearly_normal() -> None:
    ahead = np.random.default_rng(1).integers(-46, 47, 30_000)
    distance = abs(ahead.sum()) / np.sqrt((ahead**2).sum())
    assert 0.01 < mcnemar(ahead) < 0.99
    assert mcnemar(ahead) == pytest.approx(2 * norm.sf(distance), abs=1e-3)


def test_rounding_is_no_evidence() -> None:
    every_size = np.arange(1, 200)  # all ahead for the first: 2 of 2 ** 199 choices of signs
    assert mcnemar(every_size) == LEAST_P
    assert mcnemar(np.full(199, 3)) == pytest.approx(2 * 0.5**199, rel=1e-9, abs=0)


def test_holm_is_that_of_statsmodels() -> None:
    random = np.random.default_rng(2)
    for count in (0, 1, 2, 7):
        given = random.uniform(0, 0.4, count)
        expected = multipletests(given, method="holm")[1] if count else []
        assert holm(list(given)) == pytest.approx(list(expected))


def test_equal_answers_do_not_differ() -> None:
    found = paired(FIRST, FIRST, alone(1600))
    assert (found.p_value, found.only_first, found.only_second) == (1, 0, 0)
    assert {(one.interval.low, one.interval.high) for one in found.differences} == {(0, 0)}


def test_differences_are_those_of_the_figures_on_the_same_resamples() -> None:
    golds = "ab" * 100
    first, second = rows("ab" * 80 + "ba" * 20, golds), rows("ab" * 60 + "ba" * 40, golds)
    bootstrap = alone(200)
    found = {one.name: one.interval for one in paired(first, second, bootstrap).differences}
    one, two = measures(first, bootstrap), measures(second, bootstrap)
    assert found["macro_f1"].value == one["macro_f1"].value - two["macro_f1"].value
    low = np.quantile(one["macro_f1"].resampled - two["macro_f1"].resampled, 0.025)
    assert found["macro_f1"].low == low
    apart = bootstrap.of(one["accuracy"]).high - bootstrap.of(two["accuracy"]).low
    assert found["accuracy"].high < apart  # pairing narrows it
    assert list(found) == [name for name in TITLES if name in one]


def test_rows_may_come_in_another_order() -> None:
    order = list(np.random.default_rng(1).permutation(1600))
    columns = ("ids", "texts", "golds", "answers", "errors")
    moved = replace(SECOND, **{name: tuple(getattr(SECOND, name)[n] for n in order) for name in columns})
    assert paired(FIRST, moved, alone(1600)) == paired(FIRST, SECOND, alone(1600))


def test_sets_are_right_as_a_whole() -> None:
    names, task = tuple("123"), Task("labels", ("a", "b"), 2)
    golds = (("a", "b"), ("a",), ("b",))
    joined = ("a; b", "a", "b")
    first = Predictions(task, names, names, joined, joined, (None,) * 3, None, golds, golds)
    second = replace(first, answers=("b; a", "a; b", "b"), answer_sets=(("b", "a"), ("a", "b"), ("b",)))
    found = paired(first, second, alone(3))
    assert (found.only_first, found.only_second) == (1, 0)
    assert [one.name for one in found.differences] == [
        *("exact_match", "any_overlap", "jaccard", "macro_f1", "micro_f1"),
    ]


def test_free_answers_are_compared_too() -> None:
    names, task = tuple("12"), Task("text", answer_kind="numbers-and-spans")
    first = Predictions(task, names, names, ("5 million", "red"), ("$5,000,000", "red"), (None, None))
    found = paired(first, replace(first, answers=("5", "a red car")), alone(2))
    assert (found.only_first, found.only_second) == (2, 0)
    assert [one.name for one in found.differences] == ["exact_match", "numeracy_f1"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        pytest.param(rows("a"), "'row 1' is not in the second", id="fewer"),
        pytest.param(rows("aaa"), "'row 2' is not in the first", id="more"),
        pytest.param(rows("aa", "ab"), "row row 1 has the gold answer 'a' in one and 'b'", id="gold"),
        pytest.param(replace(rows("aa"), task=Task("text")), "answers to different tasks", id="task"),
    ],
)
def test_other_rows_are_refused(other: Predictions, message: str) -> None:
    with pytest.raises(BadDataError, match=message):
        paired(rows("aa"), other, alone(2))

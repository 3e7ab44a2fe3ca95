"""TAT-QA's figures: what its own script says of numbers, scales, spans and lists."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tunemill.evaluate import answers
from tunemill.evaluate.bootstrap import Bootstrap
from tunemill.evaluate.numbers import kind, score
from tunemill.evaluate.predictions import Predictions
from tunemill.task import Task

DATA = Path(os.environ.get("TUNEMILL_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
QUESTIONS = DATA / "tatqa" / "dev.json"


@pytest.mark.parametrize(  # the values are what TAT-QA's own script says, F1 to two decimals
    ("gold", "answer", "exact", "f1"),
    [
        pytest.param("12.6 million", "$12,600,000", 1, 1, id="scale"),
        pytest.param("12.6 million", "12.6", 0, 0, id="scale-missing"),
        pytest.param("12.6 million", "12.6 thousand", 0, 0, id="scale-wrong"),
        pytest.param("12.6 million", "12,600 thousand", 1, 1, id="scale-other"),
        pytest.param("12.6 million", "12.6 million dollars", 1, 1, id="scale-with-dollars"),
        pytest.param("12.6 million", "12.6 Millions", 1, 1, id="scale-in-plural"),
        pytest.param("12.6 million", "12.6 years", 0, 0, id="scale-of-no-kind"),
        pytest.param("-12.6 million", "12.6 million", 0, 0, id="sign"),
        pytest.param("-12.6", "(12.6)", 1, 1, id="parentheses"),
        pytest.param("-12.6 million", "$(12.6) million", 1, 1, id="parentheses-after-currency"),
        pytest.param("-12.6 million", "($12.6) million", 0, 0, id="parentheses-around-currency"),
        pytest.param("-1200", "(1,200)", 0, 0, id="parentheses-around-thousands"),
        pytest.param("(1,200)", "1200", 1, 1, id="parentheses-around-thousands-lost"),
        pytest.param("-5.12 percent", "(5.12%)", 0, 0, id="parentheses-around-percent"),
        pytest.param("-1200", "-$1,200", 1, 1, id="sign-before-currency"),
        pytest.param("-12.6", "- 12.6", 0, 0, id="sign-apart"),
        pytest.param("-12.6", "\N{MINUS SIGN}12.6", 0, 0, id="minus-sign"),
        pytest.param("12.6", "$ 12.60", 1, 1, id="currency-apart"),
        pytest.param("12.6", "US$12.6", 0, 0, id="currency-in-letters"),
        pytest.param("22.22 percent", "22.22%", 1, 1, id="percent-sign"),
        pytest.param("22.22 percent", "22.22 %", 1, 1, id="percent-sign-apart"),
        pytest.param("22.22 percent", "22.22% percent", 1, 1, id="percent-twice"),
        pytest.param("22.22 percent", "22.22 percentage points", 1, 1, id="percent-points"),
        pytest.param("22.22 percent", "0.2222", 1, 1, id="percent-share"),
        pytest.param("22.22 percent", "0.22224", 1, 1, id="percent-share-of-five-decimals"),
        pytest.param("22.22 percent", "22.22", 0, 0, id="percent-missing"),
        pytest.param("22.22 percent", "22.2249%", 1, 1, id="two-decimals"),
        pytest.param("0.87", "0.8734", 1, 1, id="two-decimals-of-no-scale"),
        pytest.param("12.6 million", "12,600,004", 0, 0, id="two-decimals-of-its-own-scale"),
        pytest.param("22.22 percent", "22.23%", 0, 0, id="third-decimal"),
        pytest.param("0.12", "0.125", 1, 1, id="half-to-even"),
        pytest.param("2.67", "2.675", 1, 1, id="half-as-stored"),
        pytest.param("12.6", "12.6.", 0, 0, id="full-stop"),
        pytest.param("12.6 million", "about 12.6 million", 0, 0, id="words-around-a-number"),
        pytest.param("2019; 2018; 2017", "2017; 2019; 2018", 1, 1, id="any-order"),
        pytest.param("2019; 2018", "2019", 0, 0.67, id="one-of-two"),
        pytest.param("2019", "2019; 2018", 0, 0, id="one-too-many"),
        pytest.param("73,260; 57,770 thousand", "57.77; 73.26 million", 1, 1, id="scale-of-all"),
        pytest.param("red; blue million", "red; blue", 0, 0.8, id="scale-of-texts-too"),
        pytest.param("5 thousand; 6 million", "6,000,000; 5,000", 1, 1, id="each-its-own-scale"),
        pytest.param("110.43; 1,100.50", "110.43; 1100.50", 0, 1, id="order-as-spelt"),
        pytest.param("2; 2; 3", "2; 3; 3", 0, 1, id="each-once"),
        pytest.param("the US dollar", "a US dollar.", 1, 1, id="articles"),
        pytest.param("fixed-price type", "fixed price type", 0, 0.4, id="hyphen"),
        pytest.param("fixed-price type", "fixedprice type", 1, 1, id="hyphen-lost"),
        pytest.param("U.S. dollar", "US dollar", 1, 1, id="dots"),
        pytest.param(
            "the company\N{RIGHT SINGLE QUOTATION MARK}s debt", "the company's debt", 0, 0.5, id="curly-quote"
        ),
        pytest.param("Net Income", "net income", 1, 1, id="case"),
        pytest.param("cost plus type", "cost plus", 0, 0.8, id="words"),
        pytest.param("type cost plus", "cost plus type", 0, 1, id="order-of-words"),
        pytest.param("net income; tax", "net income tax", 1, 1, id="parts-run-together"),
        pytest.param("growth of 5 units", "growth of 6 units", 0, 0.75, id="number-in-words"),
        pytest.param("net income of $1,200", "net income: 1200", 0, 0.86, id="number-in-words-spelt"),
        pytest.param(
            "net income of 1,200.0", "net income of 1200", 0, 0.75, id="number-in-words-with-a-point"
        ),
        pytest.param("ended 2018/19", "ended 201819", 1, 1, id="number-after-punctuation-is-gone"),
        pytest.param("none", "", 0, 0, id="empty"),
        pytest.param("-", ".", 1, 1, id="nothing-but-punctuation"),
        pytest.param("debt", "the", 0, 0, id="nothing-but-an-article"),
    ],
)
def test_figures_of_one_answer(gold: str, answer: str, exact: float, f1: float) -> None:
    assert score(gold, answer) == (exact, pytest.approx(f1, abs=0.005))


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        pytest.param("0.5", ".5", 1, id="no-digit-before-the-point"),  # to the script, .5 and .7 are equal
        pytest.param("1", "1e5", 0, id="exponent"),
        pytest.param("12345678901234567890123456", "1", 0, id="long"),
        pytest.param("9" * 5000, "9" * 5000, 1, id="longer-than-an-int-is-read"),
        pytest.param("5", "(5) million " + "1" * 50_000, 0, id="long-run-of-digits"),
    ],
)
def test_spellings_that_the_script_cannot_read(gold: str, answer: str, right: float) -> None:
    assert score(gold, answer)[0] == right


@pytest.mark.parametrize(
    ("gold", "found"),
    [
        ("-12.6 million", "number"),
        ("$ (3)", "number"),
        ("$ (3", "number"),
        ("3-4", "span"),
        ("3 years", "span"),
        ("3 million dollars", "number"),
        ("2019", "number"),
        ("a b", "span"),
        ("1; x", "spans"),
    ],
)
def test_kinds(gold: str, found: str) -> None:
    assert kind(gold) == found


def test_report_has_each_kind() -> None:
    golds = ("5 million", "red", "1; 2", "3 percent")
    names = tuple("1234")
    given = Predictions(
        Task("text", answer_kind="numbers-and-spans"),
        names,
        names,
        golds,
        ("5,000 thousand", "a red car", "2; 1", None),
        (None, None, None, "too long"),
    )
    bootstrap = Bootstrap(200, 0.95, 1, np.arange(4))
    found = answers.free_answers(given, answers.measures(given, bootstrap), bootstrap)
    assert found.exact_match.value == 0.5
    assert found.f1.value == pytest.approx((1 + 2 / 3 + 1 + 0) / 4)
    assert [(one.name, one.rows, one.exact_match.value) for one in found.by_kind] == [
        ("number", 2, 0.5),
        ("span", 1, 0),
        ("spans", 1, 1),
    ]
    assert found.by_kind[1].f1.low <= 2 / 3 <= found.by_kind[1].f1.high


@pytest.mark.skipif(not QUESTIONS.exists(), reason="set TUNEMILL_TEST_DATA to the folder of real data")
def test_true_answers_of_the_development_set_are_right_and_their_negations_wrong() -> None:
    from tunemill.data.tatqa import rows

    found = list(rows(json.loads(QUESTIONS.read_text()), QUESTIONS.name))
    assert [one["uid"] for one in found if score(*(one["answer_with_scale"],) * 2) != (1, 1)] == []
    arithmetic = [one["answer_with_scale"] for one in found if one["answer_type"] == "arithmetic"]
    assert {kind(one) for one in arithmetic} == {"number"}
    negated = [one.removeprefix("-") if one.startswith("-") else f"-{one}" for one in arithmetic]
    pairs = [
        (gold, other) for gold, other in zip(arithmetic, negated, strict=True) if set(gold) & set("123456789")
    ]
    wrong = [score(*pair)[1] for pair in pairs]
    assert len(wrong) > 700
    assert sum(wrong) == 0

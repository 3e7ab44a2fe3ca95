"""Kappa and alpha, against scikit-learn, krippendorff and published values."""

from __future__ import annotations

import krippendorff
import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from tunemill.evaluate.agreement import agreement, alphas, coincidences, value_counts
from tunemill.evaluate.bootstrap import Bootstrap
from tunemill.evaluate.predictions import Predictions
from tunemill.task import Task

# Krippendorff (2011), "Computing Krippendorff's alpha-reliability", section C: four observers, twelve units.
PUBLISHED = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""
ALPHA = {"nominal": 0.743, "ordinal": 0.815}


def published() -> dict[str, np.ndarray]:
    lines = [line.split() for line in PUBLISHED.strip().splitlines()]
    return {
        f"coder {n}": np.array([-1 if one == "." else int(one) - 1 for one in line])
        for n, line in enumerate(lines)
    }


@pytest.mark.parametrize("level", ALPHA)
def test_alpha_of_the_published_example(level: str) -> None:
    counted = value_counts(published(), 5)
    value = alphas(coincidences(counted, level).sum(axis=0, keepdims=True), 5, level)[0]
    assert round(value, 3) == ALPHA[level]


@pytest.mark.parametrize("level", ALPHA)
def test_alpha_of_any_codes_is_krippendorffs(level: str) -> None:
    random = np.random.default_rng(2)
    codes = {f"{n}": random.choice([-1, 0, 0, 1, 2, 3], 80) for n in range(3)}
    counted = value_counts(codes, 4)
    wanted = krippendorff.alpha(
        value_counts=counted.astype(int), value_domain=[0, 1, 2, 3], level_of_measurement=level
    )
    value = alphas(coincidences(counted, level).sum(axis=0, keepdims=True), 4, level)[0]
    assert value == pytest.approx(wanted)


def coded(ordered: bool, rows: int = 90) -> Predictions:
    random = np.random.default_rng(7)
    golds = random.integers(0, 3, rows)

    def another(share: float) -> tuple[str, ...]:
        return tuple("abc"[one if random.random() < share else random.integers(0, 3)] for one in golds)

    names = tuple(str(n) for n in range(rows))
    return Predictions(
        Task("label", tuple("abc"), ordered=ordered),
        names,
        names,
        tuple("abc"[one] for one in golds),
        (None, *another(0.7)[1:]),
        ("too long", *(None,) * (rows - 1)),
        coders={"Ann": another(0.9), "Bob": (None, None, *another(0.8)[2:])},
    )


@pytest.mark.parametrize("ordered", [False, True])
def test_the_model_is_one_coder_among_others(ordered: bool) -> None:
    given = coded(ordered)
    found = agreement(given, Bootstrap(300, 0.95, 1, np.arange(90)))
    assert [(one.first, one.second, one.rows) for one in found.pairs] == [
        ("model", "gold", 89),
        ("model", "Ann", 89),
        ("model", "Bob", 88),
        ("Ann", "Bob", 88),
    ]
    columns = {"model": given.answers, "gold": given.golds, **given.coders}
    for one in found.pairs:
        both = [
            pair for pair in zip(columns[one.first], columns[one.second], strict=True) if None not in pair
        ]
        assert one.accuracy.value == pytest.approx(np.mean([a == b for a, b in both]))
        assert one.cohen_kappa.value == pytest.approx(cohen_kappa_score(*zip(*both, strict=True)))
        assert one.cohen_kappa.low < one.cohen_kappa.value < one.cohen_kappa.high
        weighted = cohen_kappa_score(*zip(*both, strict=True), weights="quadratic") if ordered else None
        assert (one.weighted_kappa and one.weighted_kappa.value) == (weighted and pytest.approx(weighted))
    assert found.level_of_measurement == ("ordinal" if ordered else "nominal")
    codes = [
        ["abc".index(one) if one else np.nan for one in columns[name]] for name in ("Ann", "Bob", "model")
    ]
    for wanted, coders in ((found.coders_alpha, codes[:2]), (found.alpha, codes)):
        alpha = krippendorff.alpha(np.array(coders), level_of_measurement=found.level_of_measurement)
        assert wanted.value == pytest.approx(alpha)
        assert wanted.low < wanted.value < wanted.high


def test_alpha_of_one_label_alone_is_undefined() -> None:
    names = ("1", "2", "3")
    given = Predictions(Task("label", ("a", "b")), names, names, ("a",) * 3, ("a",) * 3, (None,) * 3)
    found = agreement(given, Bootstrap(100, 0.95, 1, np.arange(3)))
    assert (found.alpha, found.coders_alpha, found.pairs[0].cohen_kappa) == (None, None, None)
    assert found.pairs[0].accuracy.value == 1


@pytest.mark.parametrize("level", ALPHA)
def test_alpha_of_a_resample_is_krippendorffs_of_the_rows_it_takes(level: str) -> None:
    random = np.random.default_rng(12)
    codes = {f"{n}": random.choice([-1, 0, 0, 0, 1, 2], 50) for n in range(3)}
    counted, bootstrap = value_counts(codes, 3), Bootstrap(100, 0.95, 2, np.arange(50))
    found = alphas(bootstrap.sums(coincidences(counted, level)), 3, level)
    for number, taken in enumerate(next(bootstrap.draws())[:5]):
        wanted = krippendorff.alpha(
            value_counts=np.repeat(counted, taken, axis=0).astype(int),
            value_domain=[0, 1, 2],
            level_of_measurement=level,
        )
        assert found[number] == pytest.approx(wanted)

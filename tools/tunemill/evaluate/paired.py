"""Two sets of predictions on the same rows: what one does better, and whether chance can explain it.

Differences are resampled in pairs: both meet the same resamples of rows. McNemar's exact test
(McNemar 1947) asks whether the rows that only one has right are split evenly between them; a row is
right if it has the true label, the whole true set, or the true answer. Rows of one cluster change
sides together, since they are no more independent here than in the resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tunemill.errors import BadDataError
from tunemill.evaluate import answers, metrics, several
from tunemill.evaluate.bootstrap import Bootstrap, Measure
from tunemill.evaluate.figures import Figure, Paired
from tunemill.evaluate.predictions import Predictions

TITLES = {
    "accuracy": "Accuracy",
    "exact_match": "Exact match",
    "any_overlap": "Any overlap",
    "jaccard": "Jaccard",
    "macro_f1": "Macro F1",
    "micro_f1": "Micro F1",
    "weighted_f1": "Weighted F1",
    "balanced_accuracy": "Balanced accuracy",
    "cohen_kappa": "Cohen's κ",
    "mean_absolute_error": "Mean absolute difference",
    "quadratic_kappa": "Cohen's κ, quadratic weights",
    "token_f1": "Token F1",
    "numeracy_f1": "Numeracy-aware F1",
}
"""The headline figures in their order: by key, for people. The first that a form has is its main one."""

LEAST_P = 1e-12
"""More than what rounding leaves where probabilities are convolved by Fourier transforms."""

FORMS = {"label": metrics.measures, "labels": several.measures, "text": answers.measures}


def measures(predictions: Predictions, bootstrap: Bootstrap) -> dict[str, Measure]:
    """Return every figure of any form, of the rows and of their resamples."""
    return FORMS[predictions.task.form](predictions, bootstrap)


def headlines(measured: Mapping[str, Measure], bootstrap: Bootstrap) -> tuple[Figure, ...]:
    """Return the headline figures that are defined, the main one first."""
    return tuple(
        Figure(name, title, bootstrap.of(measured[name]))
        for name, title in TITLES.items()
        if name in measured and not np.isnan(measured[name].value)
    )


def paired(first: Predictions, second: Predictions, bootstrap: Bootstrap) -> Paired:
    """Compare two predictions of the same rows, in whichever order those of the second are.

    ``bootstrap`` has the clusters of the first.

    Raises:
        BadDataError: their rows, their gold answers or their forms differ.
    """
    second = in_order(first, second)
    both = measures(first, bootstrap), measures(second, bootstrap)
    return compared(first, second, both, bootstrap)


def compared(
    first: Predictions,
    second: Predictions,
    measured: tuple[Mapping[str, Measure], Mapping[str, Measure]],
    bootstrap: Bootstrap,
) -> Paired:
    """Compare two predictions of the same rows in the same order, whose figures are known."""
    one, two = right(first), right(second)
    ahead = np.bincount(bootstrap.clusters, one.astype(np.intp) - two).astype(np.intp)
    gains = {
        name: Measure(own.value - other.value, own.resampled - other.resampled)
        for name, own in measured[0].items()
        for other in [measured[1].get(name)]
        if other is not None
    }
    return Paired(
        rows=len(first),
        differences=headlines(gains, bootstrap),
        only_first=int((one & ~two).sum()),
        only_second=int((two & ~one).sum()),
        p_value=mcnemar(ahead),
    )


def right(predictions: Predictions) -> npt.NDArray[np.bool_]:
    """Return ``(rows,)``: which rows are right as a whole."""
    if predictions.task.form == "labels":
        gold, answer = several.flags(predictions)
        whole: npt.NDArray[np.bool_] = (gold == answer).all(axis=1)
        return whole
    if predictions.task.form == "text":
        found: npt.NDArray[np.bool_] = answers.scores(predictions)[:, 0] == 1
        return found
    golds, answered = metrics.places(predictions, "golds"), metrics.places(predictions, "answers")
    same: npt.NDArray[np.bool_] = golds == answered
    return same


def mcnemar(ahead: npt.NDArray[np.intp]) -> float:
    """Return the two-sided p-value of McNemar's exact test over clusters.

    ``ahead`` is ``(clusters,)``: rows that the first alone has right minus those of the second. If neither
    were better, each cluster would be as likely ahead for one as for the other, so the sum is compared with
    those of all choices of signs (Fisher 1935, "The Design of Experiments", section 21). With clusters of
    one row these are the sides of fair coins: McNemar's test in its binomial form. With clusters of several
    sizes no p below ``LEAST_P`` is told.
    """
    from scipy.signal import convolve
    from scipy.stats import binom

    total, observed = int(abs(ahead).sum()), abs(int(ahead.sum()))
    chances = np.ones(1)  # of the rows that fall to the first
    sizes, counts = np.unique(abs(ahead[ahead != 0]), return_counts=True)
    for size, count in zip(sizes, counts, strict=True):
        of_this_size = np.zeros(size * count + 1)
        of_this_size[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = convolve(chances, of_this_size)
    sums = abs(2 * np.arange(total + 1) - total)
    least = LEAST_P if len(sizes) > 1 else 0
    return float(np.clip(chances[sums >= observed].sum(), least, 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values that count how many comparisons there are, in the order given.

    Of those under a bound, the chance that any is wrong is under that bound too, however they depend on
    each other: Holm (1979), "A simple sequentially rejective multiple test procedure".
    """
    order = np.argsort(p_values, kind="stable")
    raised = np.maximum.accumulate(np.asarray(p_values)[order] * np.arange(len(order), 0, -1))
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(raised, 1)
    return [float(p) for p in adjusted]


def in_order(first: Predictions, second: Predictions) -> Predictions:
    """Return the second's rows in the first's order.

    Raises:
        BadDataError: they are not the same rows.
    """
    if (first.task.form, first.task.answer_kind) != (second.task.form, second.task.answer_kind):
        raise BadDataError("the predictions are answers to different tasks: compare those of one task")
    places = {identifier: row for row, identifier in enumerate(second.ids)}
    missing = [one for one in first.ids if one not in places]
    if missing or len(places) != len(first):
        name, side = (missing[0], "second") if missing else (_extra(second.ids, first.ids), "first")
        raise BadDataError(
            f"the predictions are of different rows: {name!r} is not in the {side}; "
            "compare those of one split"
        )
    order = [places[identifier] for identifier in first.ids]
    moved = _take(second, order)
    for identifier, gold, other in zip(first.ids, first.golds, moved.golds, strict=True):
        if gold != other:
            raise BadDataError(
                f"row {identifier} has the gold answer {gold!r} in one and {other!r} in the other: "
                "judge both against the same data"
            )
    return moved


def _extra(names: Sequence[str], known: Sequence[str]) -> str:
    return next(name for name in names if name not in set(known))


def _take(predictions: Predictions, order: Sequence[int]) -> Predictions:
    def taken(column: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(column[row] for row in order) if column else ()

    shares = predictions.probabilities
    return Predictions(
        predictions.task,
        taken(predictions.ids),
        taken(predictions.texts),
        taken(predictions.golds),
        taken(predictions.answers),
        taken(predictions.errors),
        None if shares is None else shares[list(order)],
        taken(predictions.gold_sets),
        taken(predictions.answer_sets),
        taken(predictions.items),
        taken(predictions.dimensions),
        {coder: taken(answers) for coder, answers in predictions.coders.items()},
    )

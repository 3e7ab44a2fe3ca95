"""Figures of merit of free answers: exact match and F1.

Texts are normalised as the SQuAD evaluation does (Rajpurkar et al. 2016, arXiv 1606.05250): lower case,
without punctuation and English articles, single spaces. Numbers and spans are compared as
``numbers.py`` says. A row without an answer scores 0.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping

import numpy as np

from tunemill.evaluate import numbers
from tunemill.evaluate.bootstrap import Bootstrap, Floats, Measure, ratio
from tunemill.evaluate.figures import AnswerKind, FreeAnswers
from tunemill.evaluate.predictions import Predictions

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
F1 = {"text": "token_f1", numbers.KIND: "numeracy_f1"}


def scores(predictions: Predictions) -> Floats:
    """Return ``(rows, 2)``: exact match and F1 of every row."""
    score = numbers.score if predictions.task.answer_kind == numbers.KIND else _score
    return np.array(
        [
            (0.0, 0.0) if answer is None else score(gold, answer)
            for gold, answer in zip(predictions.golds, predictions.answers, strict=True)
        ]
    )


def measures(predictions: Predictions, bootstrap: Bootstrap) -> dict[str, Measure]:
    """Return both figures, of the rows and of their resamples."""
    found = scores(predictions)
    sums = bootstrap.sums(np.concatenate([found, np.ones((len(found), 1))], axis=1))
    return {
        name: Measure(float(found[:, column].mean()), sums[:, column] / sums[:, 2])
        for column, name in enumerate(("exact_match", F1[predictions.task.answer_kind]))
    }


def free_answers(
    predictions: Predictions, measured: Mapping[str, Measure], bootstrap: Bootstrap
) -> FreeAnswers:
    """Judge free answers; ``measured`` is what ``measures`` returned for them."""
    kind = predictions.task.answer_kind
    return FreeAnswers(
        rows=len(predictions),
        errors=sum(answer is None for answer in predictions.answers),
        answer_kind=kind,
        exact_match=bootstrap.of(measured["exact_match"]),
        f1=bootstrap.of(measured[F1[kind]]),
        by_kind=_by_kind(predictions, bootstrap) if kind == numbers.KIND else (),
    )


def exact(gold: str, answer: str) -> bool:
    """Tell whether two answers are the same after normalisation."""
    return normalise(gold) == normalise(answer)


def token_f1(gold: str, answer: str) -> float:
    """Return the harmonic mean of precision and recall over words, counted with repetition."""
    wanted, given = normalise(gold).split(), normalise(answer).split()
    if not wanted or not given:
        return float(wanted == given)
    common = (Counter(wanted) & Counter(given)).total()
    return 2 * common / (len(wanted) + len(given))


def normalise(text: str) -> str:
    """Return a text's words as they are compared."""
    plain = unicodedata.normalize("NFKC", text).lower().translate(PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", plain).split())


def _score(gold: str, answer: str) -> tuple[float, float]:
    return float(exact(gold, answer)), token_f1(gold, answer)


def _by_kind(predictions: Predictions, bootstrap: Bootstrap) -> tuple[AnswerKind, ...]:
    """Return the figures of rows whose gold answers are of each kind; resamples are those of all rows."""
    kinds = [numbers.kind(gold) for gold in predictions.golds]
    there = [kind for kind in numbers.KINDS if kind in kinds]
    blocks = np.array([there.index(kind) for kind in kinds], dtype=np.intp)
    counted = np.concatenate([scores(predictions), np.ones((len(kinds), 1))], axis=1)
    whole, drawn = bootstrap.blocks(counted, blocks, len(there))
    means, resampled = ratio(whole[:, :2], whole[:, 2:]), ratio(drawn[..., :2], drawn[..., 2:])
    return tuple(
        AnswerKind(
            kind,
            int(whole[block, 2]),
            *(
                bootstrap.interval(float(means[block, figure]), resampled[:, block, figure])
                for figure in (0, 1)
            ),
        )
        for block, kind in enumerate(there)
    )

"""Figures of merit of free answers: exact match and token F1.

Both compare normalised texts as the SQuAD evaluation does (Rajpurkar et al. 2016, arXiv
1606.05250): lower case, without punctuation and English articles, single spaces.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from dataclasses import dataclass

import numpy as np

from tunemill.evaluate.metrics import Bootstrap, Interval
from tunemill.evaluate.predictions import Predictions

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class FreeAnswers:
    """All figures of one set of free answers."""

    rows: int
    errors: int
    exact_match: Interval
    token_f1: Interval


def free_answers(predictions: Predictions, bootstrap: Bootstrap) -> FreeAnswers:
    """Judge free answers; a row without an answer scores 0."""
    scores = np.array(
        [
            (0.0, 0.0) if answer is None else (float(exact(gold, answer)), token_f1(gold, answer))
            for gold, answer in zip(predictions.golds, predictions.answers, strict=True)
        ]
    )
    sums = bootstrap.sums(np.concatenate([scores, np.ones((len(scores), 1))], axis=1))
    means = scores.mean(axis=0)
    return FreeAnswers(
        rows=len(predictions),
        errors=sum(answer is None for answer in predictions.answers),
        exact_match=bootstrap.interval(float(means[0]), sums[:, 0] / sums[:, 2]),
        token_f1=bootstrap.interval(float(means[1]), sums[:, 1] / sums[:, 2]),
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

"""Predictions of every form of task, made by hand from a seed."""

from __future__ import annotations

import random

import numpy as np

from tunemill.evaluate.predictions import Predictions
from tunemill.task import Task

TOPICS = (
    *("Macroeconomics", "Civil rights & minorities", "Health", "Agriculture", "Labour", "Education"),
    *("Environment", "Energy", "Immigration", "Transport_100%", "Law, crime, and family issues"),
)
DIMENSIONS = ("happiness", "sense of meaning and purpose", "trust in others", "financial & material worries")
LEVELS = ("low", "medium", "high")
WORDS = ("the", "house", "was", "told", "that", "a", "bill", "on", "milk,", "roads", "should", "be", "read")


def predictions_of(form: str, right: float = 0.75, rows: int = 120) -> Predictions:
    """Return ``rows`` rows; ``right`` is how often an answer is the gold one, by the same draws."""
    return {"label": one_label, "labels": several_labels, "levels": levels}.get(form, free)(form, right, rows)


def one_label(form: str, right: float, rows: int) -> Predictions:
    chance = random.Random(1)
    weights = [1 / (n + 1) for n in range(len(TOPICS))]
    golds = chance.choices(TOPICS, weights, k=rows)
    answers = [gold if chance.random() < right else chance.choices(TOPICS, weights)[0] for gold in golds]
    shares = np.full((rows, len(TOPICS)), 0.3 / len(TOPICS))
    for row, answer in enumerate(answers):
        shares[row, TOPICS.index(answer)] += 0.7 - 0.02 * (row % 20)
    shares /= shares.sum(axis=1, keepdims=True)
    given = [None if row % 40 == 39 else answer for row, answer in enumerate(answers)]
    shares[[answer is None for answer in given]] = 0
    return Predictions(
        Task("label", TOPICS),
        *_rows(rows, chance),
        tuple(golds),
        tuple(given),
        tuple("empty text" if answer is None else None for answer in given),
        shares,
        coders={"second coder": tuple(gold if chance.random() < 0.8 else TOPICS[0] for gold in golds)},
    )


def several_labels(form: str, right: float, rows: int) -> Predictions:
    chance = random.Random(2)
    golds = [
        tuple(sorted(chance.sample(TOPICS, chance.randint(1, 3)), key=TOPICS.index)) for _ in range(rows)
    ]
    answers = [
        gold if chance.random() < right else tuple(chance.sample(TOPICS, chance.randint(1, 2)))
        for gold in golds
    ]
    return Predictions(
        Task("labels", TOPICS, 3),
        *_rows(rows, chance),
        tuple("; ".join(gold) for gold in golds),
        tuple("; ".join(answer) for answer in answers),
        (None,) * rows,
        np.array([[0.8 if topic in answer else 0.05 for topic in TOPICS] for answer in answers]),
        gold_sets=tuple(golds),
        answer_sets=tuple(answers),
    )


def levels(form: str, right: float, rows: int) -> Predictions:
    chance = random.Random(3)
    _, texts = _rows(rows, chance)
    items = tuple(f"text-{row // len(DIMENSIONS)}" for row in range(rows))
    dimensions = tuple(DIMENSIONS[row % len(DIMENSIONS)] for row in range(rows))
    golds = chance.choices(LEVELS, k=rows)
    answers = [gold if chance.random() < right else chance.choice(LEVELS) for gold in golds]
    return Predictions(
        Task("label", LEVELS, ordered=True, dimensions=DIMENSIONS),
        tuple(f"{item}/{dimension}" for item, dimension in zip(items, dimensions, strict=True)),
        texts,
        tuple(golds),
        tuple(answers),
        (None,) * rows,
        np.array([[0.6 if level == answer else 0.2 for level in LEVELS] for answer in answers]),
        items=items,
        dimensions=dimensions,
    )


def free(form: str, right: float, rows: int) -> Predictions:
    chance = random.Random(4)
    golds = [f"{chance.randint(1, 400)} million" if row % 2 else chance.choice(WORDS) for row in range(rows)]
    answers = [gold if chance.random() < right else f"about {gold}" for gold in golds]
    return Predictions(
        Task("text", answer_kind="numbers-and-spans" if form == "numbers" else "text"),
        *_rows(rows, chance),
        tuple(golds),
        tuple(answers),
        (None,) * rows,
    )


def _rows(rows: int, chance: random.Random) -> tuple[tuple[str, ...], tuple[str, ...]]:
    texts = (" ".join(chance.choices(WORDS, k=chance.randint(5, 60))) for _ in range(rows))
    return tuple(f"row-{row}" for row in range(rows)), tuple(texts)

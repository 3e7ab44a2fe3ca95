"""What a model has to beat: always the commonest answer, and TF-IDF with logistic regression.

Both learn from the train split the model was fine-tuned on and answer the very rows it answered,
so the figures stand side by side. Where texts are rated on several dimensions, each is learned on its own.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunemill.errors import BadDataError
from tunemill.evaluate.predictions import Predictions
from tunemill.evaluate.prepared import read_rows
from tunemill.task import Task

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Training:
    """Texts with labels to learn from; equal lengths throughout."""

    texts: tuple[str, ...] = ()
    labels: tuple[Labels, ...] = ()
    """One label of each text, or several."""
    dimensions: tuple[str | None, ...] = ()
    """What of the text the labels are about, where there is more than one thing."""

    def of(self, dimension: str | None) -> Training:
        """Return the rows about one dimension."""
        kept = [row for row, one in enumerate(self.dimensions) if one == dimension]
        return Training(
            tuple(self.texts[row] for row in kept),
            tuple(self.labels[row] for row in kept),
            (dimension,) * len(kept),
        )


Method = Callable[[Training, Sequence[str]], Sequence[Labels] | None]
"""Learns, and answers texts; None when there is too little to learn."""


def read_training(data: Path, task: Task) -> Training:
    """Read the labelled rows of the train split; none when there is no such file, or no labels.

    Raises:
        BadDataError: the file is damaged.
    """
    path = data / "train.parquet"
    if not task.labels or not path.exists():
        return Training()
    column = "labels" if task.form == "labels" else "label"
    wanted = ["text", column, *(["dimension"] if task.dimensions else [])]
    kept = [
        (sys.intern(row["text"]), row[column], row.get("dimension"))
        for row in read_rows(path, wanted)
        if row["text"] and row[column]
    ]
    return Training(
        tuple(text for text, _, _ in kept),
        tuple((answer,) if column == "label" else tuple(answer) for _, answer, _ in kept),
        tuple(dimension for _, _, dimension in kept),
    )


def answer(method: Method, training: Training, predictions: Predictions) -> Predictions | None:
    """Answer the predictions' rows by a method, dimension by dimension; None where it cannot learn one.

    Raises:
        BadDataError: the train split has a label that is outside the predictions' set.
    """
    if outside := {one for labels in training.labels for one in labels} - set(predictions.labels):
        raise BadDataError(f"the train split has the label {min(outside)!r}, outside the predictions' set")
    found: dict[int, Labels] = {}
    asked = predictions.dimensions or (None,) * len(predictions)
    for dimension in dict.fromkeys(asked):
        rows = [row for row, one in enumerate(asked) if one == dimension]
        given = method(training.of(dimension), [predictions.texts[row] for row in rows])
        if given is None:
            return None
        found.update(zip(rows, given, strict=True))
    sets = tuple(found[row] for row in range(len(predictions)))
    several = predictions.task.form == "labels"
    joined = [predictions.task.separator.join(labels) for labels in sets]
    return predictions.answered(joined, sets if several else ())


def majority(training: Training, texts: Sequence[str]) -> Sequence[Labels] | None:
    """Answer every text with the labels most frequent in training, the first of equals by name."""
    if not training.labels:
        return None
    counts = Counter(tuple(sorted(labels)) for labels in training.labels)
    return [min(counts, key=lambda labels: (-counts[labels], labels))] * len(texts)


@dataclass(frozen=True)
class Tfidf:
    """Logistic regression over TF-IDF of words and word pairs, as a method."""

    max_features: int
    max_rows: int
    max_labels: int
    """Most labels of one answer."""
    several: bool
    """An answer may have more than one."""

    def __call__(self, training: Training, texts: Sequence[str]) -> Sequence[Labels] | None:
        """Answer texts; None when the training rows do not hold two labels and any word."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        known, labels = training.texts[: self.max_rows], training.labels[: self.max_rows]
        if len({one for some in labels for one in some}) < 2 or not any(map(_has_word, known)):
            return None
        vectorizer = TfidfVectorizer(
            sublinear_tf=True, ngram_range=(1, 2), max_features=self.max_features, token_pattern=r"(?u)\w+"
        )
        rows = vectorizer.fit_transform(known), vectorizer.transform(list(texts))
        return _several(*rows, labels, self.max_labels) if self.several else _one(*rows, labels)


def _has_word(text: str) -> bool:
    return any(len(word) > 1 for word in text.split())


def _regression() -> Any:
    from sklearn.linear_model import LogisticRegression

    # C=10: TF-IDF rows have length 1, for which scikit-learn's C=1 regularises too much
    return LogisticRegression(C=10, tol=1e-3, max_iter=200)


def _one(known: Any, asked: Any, labels: Sequence[Labels]) -> Sequence[Labels]:
    model = _regression().fit(known, [some[0] for some in labels])
    return [(str(label),) for label in model.predict(asked)]


def _several(known: Any, asked: Any, labels: Sequence[Labels], most: int) -> Sequence[Labels]:
    """Answer with every label that is likelier than not, the likeliest first; from one to ``most``."""
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.preprocessing import MultiLabelBinarizer

    binarizer = MultiLabelBinarizer()
    with warnings.catch_warnings():  # a label that all rows have is answered always, which is right
        warnings.filterwarnings("ignore", "Label .* is present in all training examples")
        model = OneVsRestClassifier(_regression()).fit(known, binarizer.fit_transform(labels))
    answers = []
    for shares in model.predict_proba(asked):
        ranked = np.argsort(-shares, kind="stable")[:most]
        chosen = [place for rank, place in enumerate(ranked) if not rank or shares[place] > 0.5]
        answers.append(tuple(str(binarizer.classes_[place]) for place in chosen))
    return answers

"""Predictions beside their gold answers, whoever made them.

``read_predictions`` takes the artifact of ``infer``; ``read_csv`` any table that has a gold and a
predicted column, such as a published study's. Both give the same ``Predictions``; everything after
knows only that.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tunemill.errors import BadDataError
from tunemill.task import read_labels

FILE = "predictions.parquet"
COLUMNS = ("id", "text", "label", "gold", "probabilities", "error")


@dataclass(frozen=True)
class Predictions:
    """Rows in their order; equal lengths throughout."""

    labels: tuple[str, ...]
    """The task's set; empty for free answers."""
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    golds: tuple[str, ...]
    answers: tuple[str | None, ...]
    """None where the row has an error."""
    errors: tuple[str | None, ...]
    probabilities: npt.NDArray[np.float64] | None
    """``(rows, labels)``, zeros in rows with an error; None when there are none."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ids)


def read_predictions(directory: Path) -> Predictions:
    """Read the artifact of ``infer``.

    Raises:
        BadDataError: files are absent or malformed, a row has no gold answer, or a label is
            outside the task's set.
    """
    import pyarrow
    import pyarrow.parquet

    path = directory / FILE
    labels = read_labels(directory)
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise BadDataError(f"{FILE} cannot be read ({reason}): run infer again") from error
    if absent := [name for name in COLUMNS if name not in table.column_names]:
        raise BadDataError(f"{FILE} lacks the column {absent[0]}: run infer again")
    columns = {name: tuple(table[name].to_pylist()) for name in COLUMNS}
    return checked(
        Predictions(
            labels,
            columns["id"],
            tuple(text or "" for text in columns["text"]),
            columns["gold"],
            columns["label"],
            columns["error"],
            _matrix(columns["probabilities"], len(labels)),
        ),
        FILE,
    )


def read_csv(
    path: Path, gold: str, predicted: str, identifier: str | None = None, text: str | None = None
) -> Predictions:
    """Read a table made elsewhere; arguments after ``path`` are its column names.

    The set of labels is what occurs in either column, numbers in numeric order. An empty predicted
    field is a row without an answer.

    Raises:
        BadDataError: a column or a gold value is missing, or the file is empty.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as source:
            rows = list(csv.DictReader(source))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadDataError(f"{path.name} cannot be read: {error}") from error
    for column in filter(None, (gold, predicted, identifier, text)):
        if rows and column not in rows[0]:
            there = ", ".join(str(name) for name in rows[0])
            raise BadDataError(f"{path.name} has no column {column}: choose from {there}")
    answers = tuple((row[predicted] or "").strip() or None for row in rows)
    golds = tuple((row[gold] or "").strip() for row in rows)
    found = {*golds, *(answer for answer in answers if answer)} - {""}
    return checked(
        Predictions(
            labels=tuple(sorted(found, key=_natural)),
            ids=tuple(row[identifier] if identifier else str(n + 1) for n, row in enumerate(rows)),
            texts=tuple(row[text] if text else "" for row in rows),
            golds=golds,
            answers=answers,
            errors=tuple(None if answer else "no answer" for answer in answers),
            probabilities=None,
        ),
        path.name,
    )


def checked(predictions: Predictions, name: str) -> Predictions:
    """Return the predictions if every row can be judged.

    Raises:
        BadDataError: there are no rows, or one cannot be judged; the message says which.
    """
    if not len(predictions):
        raise BadDataError(f"{name} has no rows")
    known = set(predictions.labels)
    rows = zip(predictions.ids, predictions.golds, predictions.answers, predictions.errors, strict=True)
    for identifier, gold, answer, error in rows:
        if not gold:
            raise BadDataError(f"{name}: row {identifier} has no gold answer, so it cannot be judged")
        for what, value in (("gold", gold), ("predicted", answer)):
            if known and value is not None and value not in known:
                raise BadDataError(
                    f"{name}: row {identifier} has the {what} label {value!r}, outside the set"
                )
        if answer is None and not error:
            raise BadDataError(f"{name}: row {identifier} has neither an answer nor an error")
    return predictions


def _matrix(rows: Sequence[Sequence[float] | None], width: int) -> npt.NDArray[np.float64] | None:
    if not any(rows):
        return None
    wrong = next((len(row) for row in rows if row and len(row) != width), None)
    if wrong is not None:
        raise BadDataError(f"{FILE} has {wrong} probabilities in a row, the task {width} labels")
    return np.array([row or [0.0] * width for row in rows], dtype=np.float64)


def _natural(label: str) -> tuple[Any, ...]:
    return (0, int(label), "") if label.isdecimal() else (1, 0, label)

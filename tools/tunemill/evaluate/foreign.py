"""Predictions from elsewhere: any CSV file with a gold and a predicted column, such as a study's.

The set of labels is what occurs in the file, numbers in numeric order, unless the levels are given. An
empty predicted field is a row without an answer; where there are dimensions, each row is one text
on one of them.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tunemill.errors import BadDataError
from tunemill.evaluate.predictions import Predictions, checked, checked_answers
from tunemill.task import Task

NO_ANSWER = "no answer"
SURPLUS = "\0surplus"  # no column can be called so
LONGEST = 1 << 24  # characters of one field; csv's own 131,072 are less than a long speech
TOLERANCE = 0.01  # what rounding may take from or add to probabilities that sum to 1

Row = Mapping[str, str]


@dataclass(frozen=True)
class Columns:
    """What is where in a table."""

    gold: str
    predicted: str
    id: str | None = None
    """Without it rows are numbered from 1."""
    text: str | None = None
    dimension: str | None = None
    item: str | None = None
    """The text's own id, where it has several rows: they are resampled together."""
    coders: tuple[str, ...] = ()
    """What further people answered."""
    versus: tuple[str, ...] = ()
    """What other models answered."""
    probability_prefix: str | None = None
    """The probability of label L is in the column of this and L."""
    delimiter: str = ","


@dataclass(frozen=True)
class Answers:
    """What the answers are; as they stand, one label each."""

    separator: str | None = None
    """What stands between the labels of an answer that may have several."""
    levels: tuple[str, ...] = ()
    """The labels, the lowest first, where they have an order."""
    kind: str | None = None
    """One of ``ANSWER_KINDS``, where answers are free."""


def read_csv(path: Path, columns: Columns, answers: Answers, corpus: Path | None = None) -> Predictions:
    """Read a table; the labels of ``corpus``, a table of predictions alone, belong to the set too.

    Raises:
        BadDataError: a column or a gold value is missing, a probability is none, or a label is outside the
            levels.
    """
    rows = _read(path, columns, (columns.gold, *columns.coders, *columns.versus))
    others = _read(corpus, columns, ()) if corpus else []
    task = _task(rows, others, columns, answers)
    found = replace(
        _answered(rows, task, columns, answers),
        golds=tuple(_joined(row[columns.gold], answers) for row in rows),
        gold_sets=_sets(rows, columns.gold, answers),
        coders={name: tuple(row[name] or None for row in rows) for name in columns.coders},
        probabilities=_probabilities(rows, task, columns, path.name),
    )
    return checked(found, path.name)


def read_others(
    path: Path, columns: Columns, answers: Answers, judged: Predictions
) -> dict[str, Predictions]:
    """Read what other models answered in the table that ``judged`` was read from, by their columns.

    Raises:
        BadDataError: a label is outside the set.
    """
    found = {}
    for name in columns.versus:
        rows = _read(path, columns, (name,))
        other = _answered(rows, judged.task, replace(columns, predicted=name), answers)
        own = replace(other, golds=judged.golds, gold_sets=judged.gold_sets)
        found[name] = checked(own, f"{path.name}, {name}")
    return found


def read_corpus(path: Path, columns: Columns, answers: Answers, task: Task) -> Predictions:
    """Read a table of predictions alone, of the same task.

    Raises:
        BadDataError: a column is missing, it has no rows, or a label is outside the set.
    """
    return checked_answers(_answered(_read(path, columns, ()), task, columns, answers), path.name)


def _read(path: Path, columns: Columns, further: Sequence[str]) -> list[Row]:
    """Return the rows, their fields stripped; they have the columns that are asked for and ``further``.

    Equal fields are one object: a text that is rated on 46 dimensions is in memory once.
    """
    csv.field_size_limit(LONGEST)
    rows: list[Row] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as source:
            reader = csv.DictReader(
                source, delimiter=columns.delimiter, restkey=SURPLUS, restval="", strict=True
            )
            _has_columns(path, reader.fieldnames or [], columns, further)
            for number, row in enumerate(reader, 1):
                if SURPLUS in row:
                    raise BadDataError(
                        f"{path.name}: row {number} has more fields than there are columns; "
                        "is --delimiter right?"
                    )
                rows.append({name: sys.intern(field.strip()) for name, field in row.items()})
    except UnicodeDecodeError as error:
        raise BadDataError(f"{path.name} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadDataError(f"{path.name} cannot be read: {reason}") from error
    return rows


def _has_columns(path: Path, there: Sequence[str], columns: Columns, further: Sequence[str]) -> None:
    needed = (columns.predicted, columns.id, columns.text, columns.dimension, columns.item, *further)
    for column in filter(None, needed):
        if column not in there:
            known = ", ".join(there)
            raise BadDataError(
                f"{path.name} has no column {column}: choose from {known}, or give --delimiter"
            )


def _task(rows: Sequence[Row], others: Sequence[Row], columns: Columns, answers: Answers) -> Task:
    """Return the task that a table's answers are of."""
    if answers.kind:
        return Task("text", answer_kind=answers.kind)
    given = [row[columns.gold] for row in rows] + [row[columns.predicted] for row in (*rows, *others)]
    given += [row[other] for row in rows for other in (*columns.coders, *columns.versus)]
    sets = [_split(field, answers.separator) if answers.separator else (field,) for field in given if field]
    found = {label for labels in sets for label in labels}
    labels = answers.levels or tuple(sorted(found, key=_natural))
    dimensions = tuple(dict.fromkeys(row[columns.dimension] for row in rows)) if columns.dimension else ()
    if not answers.separator:
        return Task("label", labels, ordered=bool(answers.levels), dimensions=dimensions)
    return Task("labels", labels, max(map(len, sets), default=1), answers.separator)


def _answered(rows: Sequence[Row], task: Task, columns: Columns, answers: Answers) -> Predictions:
    """Return the rows with empty gold answers."""
    given = tuple(_joined(row[columns.predicted], answers) or None for row in rows)
    sets = _sets(rows, columns.predicted, answers)
    return Predictions(
        task,
        ids=tuple(_identifier(number, row, columns) for number, row in enumerate(rows, 1)),
        texts=tuple(row[columns.text] if columns.text else "" for row in rows),
        golds=("",) * len(rows),
        answers=given,
        errors=tuple(None if answer else NO_ANSWER for answer in given),
        answer_sets=tuple(labels or None for labels in sets),
        items=tuple(row[columns.item] for row in rows) if columns.item else (),
        dimensions=tuple(row[columns.dimension] for row in rows) if columns.dimension else (),
    )


def _identifier(number: int, row: Row, columns: Columns) -> str:
    if columns.id:
        return row[columns.id]
    if columns.dimension and columns.item:
        return f"{row[columns.item]}/{row[columns.dimension]}"
    return str(number)


def _sets(rows: Sequence[Row], column: str, answers: Answers) -> tuple[tuple[str, ...], ...]:
    """Return each row's labels where there may be several; else nothing."""
    return tuple(_split(row[column], answers.separator) for row in rows) if answers.separator else ()


def _split(field: str, separator: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in field.split(separator.strip() or separator) if part.strip())


def _joined(field: str, answers: Answers) -> str:
    return answers.separator.join(_split(field, answers.separator)) if answers.separator else field


def _probabilities(
    rows: Sequence[Row], task: Task, columns: Columns, name: str
) -> npt.NDArray[np.float64] | None:
    """Return ``(rows, labels)`` probabilities, zeros in rows without an answer; None where there are none."""
    if columns.probability_prefix is None or not task.labels or not rows:
        return None
    names = [columns.probability_prefix + label for label in task.labels]
    if absent := [column for column in names if column not in rows[0]]:
        raise BadDataError(f"{name} has no column {absent[0]} for the probability of a label")
    nothing = [0.0] * len(names)
    shares = [
        _shares(row, names, f"{name}: row {number}", task) if row[columns.predicted] else nothing
        for number, row in enumerate(rows, 1)
    ]
    return np.array(shares)


def _shares(row: Row, names: Sequence[str], where: str, task: Task) -> list[float]:
    shares = []
    for column in names:
        try:
            shares.append(float(row[column]))
        except ValueError:
            raise BadDataError(f"{where} has {row[column]!r} in {column}, expected a probability") from None
        if not 0 <= shares[-1] <= 1:
            raise BadDataError(f"{where} has {row[column]} in {column}, expected a probability from 0 to 1")
    if task.form == "label" and abs(sum(shares) - 1) > TOLERANCE:
        raise BadDataError(f"{where} has probabilities that sum to {sum(shares):.3f}, expected 1")
    return shares


def _natural(label: str) -> tuple[Any, ...]:
    return (0, int(label), "") if label.isdecimal() else (1, 0, label)

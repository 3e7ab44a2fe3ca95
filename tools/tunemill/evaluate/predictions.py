"""Predictions beside their gold answers, whoever made them.

``read_predictions`` takes the artifact of ``infer``; ``foreign.py`` any CSV file with a gold and a
predicted column. Both give the same ``Predictions``; everything after knows only that.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tunemill.errors import BadDataError
from tunemill.evaluate.prepared import ROWS_AT_ONCE
from tunemill.task import Task, read_task

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

FILE = "predictions.parquet"

Sets = tuple[tuple[str, ...] | None, ...]


@dataclass(frozen=True)
class Predictions:
    """Rows in their order; equal lengths throughout."""

    task: Task
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    golds: tuple[str, ...]
    """Where a text may have several labels, these joined."""
    answers: tuple[str | None, ...]
    """None where the row has an error."""
    errors: tuple[str | None, ...]
    probabilities: npt.NDArray[np.float64] | None = None
    """``(rows, labels)``, zeros in rows with an error; None when there are none. Each row sums to 1, but
    where a text may have several labels it holds how likely each of them is among those."""
    gold_sets: tuple[tuple[str, ...], ...] = ()
    """The true labels of form ``labels``; empty for other forms."""
    answer_sets: Sets = ()
    """The predicted ones."""
    items: tuple[str, ...] = ()
    """Ids of the texts, where one has several rows, as for each dimension; else empty."""
    dimensions: tuple[str, ...] = ()
    """What of the text each row is about; else empty."""
    coders: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    """What further people answered, by their name; None where one did not."""
    most_pruned: float = 0.0
    """How far off a probability may be, because what is improbable was not computed."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ids)

    @property
    def labels(self) -> tuple[str, ...]:
        """The task's set; empty for free answers."""
        return self.task.labels

    def answered(self, answers: Sequence[str], sets: Sets = ()) -> Predictions:
        """Return the same rows with other answers, all of them there, and no probabilities."""
        nothing = (None,) * len(self)
        return replace(self, answers=tuple(answers), errors=nothing, probabilities=None, answer_sets=sets)


def read_predictions(directory: Path) -> Predictions:
    """Read the artifact of ``infer``.

    Raises:
        BadDataError: files are absent or malformed, a row has no gold answer, or a label is
            outside the task's set.
    """
    return checked(_read(directory), FILE)


def read_corpus(directory: Path) -> Predictions:
    """Read the artifact of ``infer`` for its answers alone; whether there are gold ones does not matter.

    Raises:
        BadDataError: files are absent or malformed, or a label is outside the task's set.
    """
    return checked_answers(_read(directory), FILE)


def checked(predictions: Predictions, name: str) -> Predictions:
    """Return the predictions if every row can be judged.

    Raises:
        BadDataError: there are no rows, or one cannot be judged; the message says which.
    """
    for identifier, gold in zip(predictions.ids, predictions.golds, strict=True):
        if not gold:
            raise BadDataError(f"{name}: row {identifier} has no gold answer, so it cannot be judged")
    _known(predictions, name, "gold", gold_sets(predictions))
    for coder, answers in predictions.coders.items():
        _known(predictions, name, f"{coder}'s", [() if one is None else (one,) for one in answers])
    return checked_answers(predictions, name)


def checked_answers(predictions: Predictions, name: str) -> Predictions:
    """Return the predictions if every row has an answer of the task, or says why there is none.

    Raises:
        BadDataError: there are no rows, or one is not so; the message says which.
    """
    if not len(predictions):
        raise BadDataError(f"{name} has no rows")
    rows = zip(predictions.ids, predictions.answers, predictions.errors, strict=True)
    for identifier, answer, error in rows:
        if answer is None and not error:
            raise BadDataError(f"{name}: row {identifier} has neither an answer nor an error")
    if len(set(predictions.ids)) < len(predictions):
        twice = next(one for one, count in Counter(predictions.ids).items() if count > 1)
        raise BadDataError(f"{name} has the id {twice!r} twice: give every row an id of its own")
    for identifier, dimension in zip(
        predictions.ids, predictions.dimensions, strict=False
    ):  # or there are none
        if dimension not in predictions.task.dimensions:
            raise BadDataError(f"{name}: row {identifier} is about {dimension!r}, no dimension of the task")
    _known(predictions, name, "predicted", answer_sets(predictions))
    return predictions


def gold_sets(predictions: Predictions) -> tuple[tuple[str, ...], ...]:
    """Return the true labels of every row, one or several; none for free answers."""
    return predictions.gold_sets or tuple((gold,) for gold in predictions.golds)


def answer_sets(predictions: Predictions) -> tuple[tuple[str, ...], ...]:
    """Return the predicted labels of every row; a row without an answer has none."""
    if predictions.answer_sets:
        return tuple(labels or () for labels in predictions.answer_sets)
    return tuple(() if answer is None else (answer,) for answer in predictions.answers)


def _known(predictions: Predictions, name: str, whose: str, sets: Sequence[Sequence[str]]) -> None:
    """See that labels are of the task's set, each once."""
    known = set(predictions.labels)
    if not known:
        return
    for identifier, labels in zip(predictions.ids, sets, strict=True):
        if outside := [label for label in labels if label not in known]:
            raise BadDataError(
                f"{name}: row {identifier} has the {whose} label {outside[0]!r}, outside the set"
            )
        if len(set(labels)) < len(labels):
            raise BadDataError(f"{name}: row {identifier} has a {whose} label twice: {', '.join(labels)}")


def _read(directory: Path) -> Predictions:
    import pyarrow
    import pyarrow.parquet

    task = read_task(directory)
    try:
        with pyarrow.parquet.ParquetFile(directory / FILE) as source:
            return _collect(source, task)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise BadDataError(f"{FILE} cannot be read ({reason}): run infer again") from error


def _collect(source: pyarrow.parquet.ParquetFile, task: Task) -> Predictions:
    """Read some rows at a time; equal texts become one object, such as one rated on 46 dimensions."""
    import pyarrow

    several = task.form == "labels"
    texts = ("id", "text", "label", "gold", "error", *(("item", "dimension") if task.dimensions else ()))
    lists = ("labels", "golds") if several else ()
    there = source.schema_arrow.names
    if absent := [name for name in (*texts, *lists, "probabilities") if name not in there]:
        raise BadDataError(f"{FILE} lacks the column {absent[0]}: run infer again")
    columns: dict[str, list[Any]] = {name: [] for name in (*texts, *lists)}
    shares, most_pruned = [np.zeros((0, len(task.labels)))], 0.0
    for batch in source.iter_batches(ROWS_AT_ONCE):
        for name in texts:
            given = batch[name].cast(pyarrow.string()).to_pylist()
            columns[name] += (text and sys.intern(text) for text in given)
        for name in lists:
            columns[name] += (tuple(labels or ()) for labels in batch[name].to_pylist())
        shares.append(_matrix(batch["probabilities"], len(task.labels)))
        if "pruned" in there:
            most_pruned = max([most_pruned, *filter(None, batch["pruned"].to_pylist())])
    probabilities = np.concatenate(shares)
    answers = zip(columns["label"], columns["labels"], strict=True) if several else ()
    return Predictions(
        task,
        tuple(columns["id"]),
        tuple(text or "" for text in columns["text"]),
        tuple(columns["gold"]),
        tuple(columns["label"]),
        tuple(columns["error"]),
        probabilities if probabilities.any() else None,
        gold_sets=tuple(columns["golds"]) if several else (),
        answer_sets=tuple(None if answer is None else labels for answer, labels in answers),
        items=tuple(columns.get("item", ())),
        dimensions=tuple(columns.get("dimension", ())),
        most_pruned=most_pruned,
    )


def _matrix(column: pyarrow.Array, width: int) -> npt.NDArray[np.float64]:
    """Return ``(rows, width)`` probabilities, zeros where a row has none."""
    import pyarrow
    import pyarrow.compute

    shares = column.cast(pyarrow.list_(pyarrow.float64()))
    counts = pyarrow.compute.list_value_length(shares).fill_null(0).to_numpy(zero_copy_only=False)
    wrong = counts[(counts > 0) & (counts != width)]
    if wrong.size:
        raise BadDataError(f"{FILE} has {wrong[0]} probabilities in a row, the task {width} labels")
    matrix = np.zeros((len(counts), width))
    if (counts > 0).any():
        matrix[counts > 0] = shares.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return matrix

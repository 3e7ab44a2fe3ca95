"""What a prepared dataset asks for, as ``prepare`` wrote it: read by every stage that comes after.

``task.json`` names the form of the answers and ``labels.json`` the set they are chosen from:

- ``label``: one label of the set. ``ordered`` says that the set goes from low to high; ``dimensions``
  that every text is asked about once for each of them, in a row of its own.
- ``labels``: up to ``max_labels`` labels of the set, joined by ``separator``.
- ``text``: a free answer, judged as ``answer_kind`` says.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunemill.errors import BadDataError
from tunemill.files import read_object

FILE, LABELS = "task.json", "labels.json"
FORMS = ("label", "labels", "text")
ANSWER_KINDS = ("text", "numbers-and-spans")


@dataclass(frozen=True)
class Task:
    """One task's answers."""

    form: str
    """One of ``FORMS``."""
    labels: tuple[str, ...] = ()
    """Names in the order of the probabilities; empty for free answers."""
    max_labels: int = 1
    """Most labels of one answer."""
    separator: str = "; "
    """What stands between the labels of one answer."""
    ordered: bool = False
    """The labels are levels, the lowest first."""
    dimensions: tuple[str, ...] = ()
    """What every text is rated on, where it is more than one thing."""
    answer_kind: str = "text"
    """One of ``ANSWER_KINDS``."""


def read_task(directory: Path) -> Task:
    """Read the task of prepared data or of predictions.

    Raises:
        BadDataError: the files are malformed, or a task with labels has fewer than two.
    """
    record = read_object(directory / FILE)
    form, kind = record.get("form"), record.get("answer_kind") or "text"
    if form not in FORMS or kind not in ANSWER_KINDS:
        wrong, known = ("form", FORMS) if form not in FORMS else ("answer_kind", ANSWER_KINDS)
        raise BadDataError(
            f"{FILE} has the {wrong} {record.get(wrong)!r}, expected one of {', '.join(known)}"
        )
    if form == "text":
        return Task(form, answer_kind=str(kind))
    labels = read_labels(directory)
    if len(set(labels)) < 2 or len(set(labels)) != len(labels):
        raise BadDataError(
            f"{LABELS} names {len(labels)} labels, {len(set(labels))} of them different: "
            f"a task of form {form!r} needs at least two, each once"
        )
    return Task(
        form,
        labels,
        _most(record, len(labels)) if form == "labels" else 1,
        str(record.get("separator") or "; "),
        record.get("ordered") is True,
        tuple(str(name) for name in record.get("dimensions") or ()),
    )


def read_labels(directory: Path) -> tuple[str, ...]:
    """Read the names in ``labels.json``; none for free answers.

    Raises:
        BadDataError: the file is malformed.
    """
    listed = _list(directory / LABELS)
    labels = tuple(str(label.get("name") or "") for label in listed if isinstance(label, dict))
    if len(labels) != len(listed) or not all(labels):
        raise BadDataError(f'{LABELS}: every entry needs a "name"; run prepare again')
    return labels


def _most(record: dict[str, Any], labels: int) -> int:
    most = record.get("max_labels") or labels
    if not isinstance(most, int) or not 1 <= most <= labels:
        raise BadDataError(f"{FILE} has max_labels={most!r}, expected 1 to {labels}; run prepare again")
    return most


def _list(path: Path) -> list[Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadDataError(f"{path.name} cannot be read ({error}): run prepare again") from error
    if not isinstance(value, list):
        raise BadDataError(f"{path.name} holds no JSON list: run prepare again")
    return value

"""The set of labels a task allows, and which of them a cell of the data means.

A cell is matched exactly, to a code or to a name; nothing is guessed. A label that is not in
the set stops the work, because a misspelt label would silently become a class of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from tunemill.data.config import PrepareConfig
from tunemill.errors import BadDataError


@dataclass(frozen=True)
class Label:
    """One class: the name the model writes, and the code the data may use for it."""

    name: str
    code: str | None = None


@dataclass(frozen=True)
class LabelSet:
    """All labels of a task, in the order that predictions list their probabilities."""

    labels: tuple[Label, ...]
    known: Mapping[str, str]
    """Every accepted spelling, codes and names, to the name."""

    def name_of(self, value: Any, where: str) -> str:
        """Return the name of the label that a cell means.

        Raises:
            BadDataError: the cell is empty or not in the set; suggests the nearest.
        """
        if isinstance(value, list | dict):
            raise BadDataError(f"{where} has a {type(value).__name__} as its label, expected one label")
        text = label_text(value)
        if not text:
            raise BadDataError(f"{where} has no label: give it one or remove the row")
        if text in self.known:
            return self.known[text]
        spellings = {spelling.casefold(): spelling for spelling in reversed(list(self.known))}
        near = get_close_matches(text.casefold(), spellings, 1, 0.0)
        hint = f"the nearest is {spellings[near[0]]!r}" if near else "the set is empty"
        raise BadDataError(f"{where} has the label {text!r}, which is not in the task's set: {hint}")

    def names_of(self, value: Any, separator: str, most: int, where: str) -> tuple[str, ...]:
        """Return the names of the labels that a cell means, each once, in the cell's order.

        Raises:
            BadDataError: the cell is empty, has more than ``most``, or one that is not in the set.
        """
        names = tuple(dict.fromkeys(self.name_of(part, where) for part in parts(value, separator)))
        if not names:
            raise BadDataError(f"{where} has no label: give it one or remove the row")
        if len(names) > most:
            raise BadDataError(
                f"{where} has {len(names)} labels, at most {most} are allowed: raise max_labels"
            )
        return names

    def listed(self) -> str:
        """Return the names as they stand in a prompt's ``{labels}``: one line, commas or semicolons."""
        names = [label.name for label in self.labels]
        return ("; " if any("," in name for name in names) else ", ").join(names)

    def as_json(self) -> list[dict[str, str | None]]:
        """Return what ``labels.json`` holds."""
        return [{"name": label.name, "code": label.code} for label in self.labels]


NO_LABELS = LabelSet((), {})


def label_set(configured: PrepareConfig, found: Iterable[str]) -> LabelSet:
    """Return the configured set, or that of the labels found in the data, sorted.

    Raises:
        BadDataError: two labels share a name or a code, or fewer than two are there.
    """
    labels = [Label(name.strip()) for name in sorted(set(found))]
    if isinstance(configured.labels, Mapping):
        labels = [Label(name.strip(), str(code).strip()) for code, name in configured.labels.items()]
    elif configured.labels is not None:
        labels = [Label(name.strip()) for name in configured.labels]
    if len(labels) < 2:
        raise BadDataError(f"the task has {len(labels)} label: at least two are needed to tell apart")
    known: dict[str, str] = {}
    for label in labels:
        for spelling in {label.name, label.code or label.name}:
            if known.setdefault(spelling, label.name) != label.name or not spelling:
                raise BadDataError(f"the label set uses {spelling!r} for two labels or leaves it empty")
    if len({label.name for label in labels}) < len(labels):
        raise BadDataError("the label set names one label twice")
    _check_several(configured, known, len(labels))
    return LabelSet(tuple(labels), known)


def parts(value: Any, separator: str) -> Sequence[Any]:
    """Return the labels of a cell that may have several: a list's, or what stands between separators."""
    if isinstance(value, list):
        return value
    return [part for part in map(str.strip, label_text(value).split(separator.strip())) if part]


def _check_several(configured: PrepareConfig, known: Iterable[str], labels: int) -> None:
    most, separator = configured.max_labels, configured.label_separator.strip()
    if most is None:
        return
    if most > labels:
        raise BadDataError(f"max_labels={most} is more than the {labels} labels there are: lower it")
    for spelling in known:
        if separator in spelling:
            raise BadDataError(
                f"the label {spelling!r} holds the separator {separator!r}: set another label_separator"
            )


def label_text(value: Any) -> str:
    """Return a cell as text: numbers without ``.0`` (spreadsheets make 4 into 4.0), trimmed."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()

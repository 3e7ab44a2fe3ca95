"""Contextual calibration: what a model answers to nothing at all, taken out of its answers.

A prompt alone makes some labels likelier than others. Zhao et al. (2021, arXiv 2102.09690) ask it with
inputs without content, average the labels' probabilities over them, divide each answer's probabilities
by these and let them sum to 1 again. Each dimension is a prompt of its own, and so has its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tunemill.errors import BadDataError
from tunemill.infer.pruning import Floats
from tunemill.infer.rows import Answer, Row
from tunemill.prompting import Message

FILE = "content_free.json"
"""Where ``prepare`` left the prompts without content."""


@dataclass(frozen=True)
class Calibration:
    """How likely each label is for inputs without content."""

    labels: tuple[str, ...]
    shares: Mapping[str | None, Floats]
    """``(labels,)`` probabilities that sum to 1, by dimension; by None where there are none."""

    def applied(self, answer: Answer, dimension: str | None) -> Answer:
        """Return an answer with its probabilities calibrated, and the label that is likeliest then."""
        if answer.probabilities is None:
            return answer
        odds = np.array(answer.probabilities) / self.shares[dimension]
        shares = odds / odds.sum()
        best = int(shares.argmax())
        return replace(
            answer,
            label=self.labels[best],
            probability=float(shares[best]),
            probabilities=tuple(shares.tolist()),
        )

    def record(self) -> dict[str, dict[str, float]]:
        """Return the probabilities by dimension and label, as JSON values; without dimensions by ``""``."""
        return {
            dimension or "": dict(zip(self.labels, shares.tolist(), strict=True))
            for dimension, shares in self.shares.items()
        }


def calibration_of(labels: tuple[str, ...], rows: Sequence[Row], answers: Sequence[Answer]) -> Calibration:
    """Average the answers to the rows without content, by dimension.

    Raises:
        BadDataError: one could not be asked.
    """
    found: dict[str | None, list[tuple[float, ...]]] = {}
    for row, answer in zip(rows, answers, strict=True):
        if answer.probabilities is None:
            raise BadDataError(f"calibration: {row.id} cannot be asked ({answer.error})")
        found.setdefault(row.dimension, []).append(answer.probabilities)
    least = np.finfo(np.float64).tiny  # a label that 64 bits cannot tell from impossible
    return Calibration(
        labels, {name: np.maximum(np.mean(shares, axis=0), least) for name, shares in found.items()}
    )


def content_free_rows(data: Path, dimensions: Sequence[str]) -> list[Row]:
    """Read the task's prompts without content.

    Raises:
        BadDataError: they are missing, malformed, or not those of the task's dimensions.
    """
    try:
        entries = json.loads((data / FILE).read_text("utf-8"))
        rows = [
            Row(f"the content-free prompt {number}", "nothing", _messages(entry["prompt"]), None,
                dimension=entry["dimension"])
            for number, entry in enumerate(entries, 1)
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadDataError(
            f"calibration needs the data's {FILE}, which cannot be read ({error!r}): run prepare again"
        ) from error
    if {row.dimension for row in rows} != set(dimensions or (None,)):
        raise BadDataError(f"{FILE} is not about the task's dimensions: run prepare again")
    return rows


def _messages(entries: Sequence[Mapping[str, str]]) -> tuple[Message, ...]:
    return tuple({"role": entry["role"], "content": entry["content"]} for entry in entries)

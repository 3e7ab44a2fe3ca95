"""How far a model's answers to the probe set are from the ones it should give."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from math import comb
from typing import Any

import numpy as np

from tunemill.errors import BadDataError
from tunemill.parity.distributions import Distributions
from tunemill.parity.measure import log_softmax
from tunemill.parity.probes import Probes


@dataclass(frozen=True)
class Place:
    """One predicted token."""

    probe: int
    """Which probe, from 0."""
    position: int
    """The token's place in prompt and answer, from 0."""
    expected: int
    """The token that the reference holds likeliest there."""
    found: int
    """The token that the candidate does."""
    kl: float
    """Nats."""


@dataclass(frozen=True)
class Labels:
    """How the labels chosen compare, where the task has labels."""

    flips: int
    """Probes whose likeliest label is another one."""
    lost: int
    """Of them: the reference was right, the candidate is wrong."""
    gained: int
    """The reference was wrong, the candidate is right."""
    p_value: float
    """Of McNemar's exact test of ``lost`` against ``gained``, two-sided."""


@dataclass(frozen=True)
class Comparison:
    """What differs between two models on one probe set."""

    probes: int
    positions: int
    mean_kl: float
    """Mean over the positions of KL(reference || candidate) in nats, over the whole vocabulary."""
    worst_kl: float
    """The largest of them."""
    top1: float
    """Share of positions with the same likeliest token."""
    labels: Labels | None
    worst: Place
    """Where the divergence is largest."""
    first: Place | None
    """The first position with another likeliest token."""

    def as_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)


def compare(probes: Probes, reference: Distributions, candidate: Distributions) -> Comparison:
    """Compare the answers of two models to the same probes.

    The divergence is that of Kullback and Leibler (1951), "On Information and Sufficiency".

    Raises:
        BadDataError: the two belong to other probes or other vocabularies.
    """
    _check_shapes(probes, reference, candidate)
    divergences, expected, found = _divergences(reference, candidate)
    owners = [(number, place) for number, probe in enumerate(probes.probes) for place in probe.positions]

    def place(row: int) -> Place:
        owner, position = owners[row]
        return Place(owner, position + 1, int(expected[row]), int(found[row]), float(divergences[row]))

    differing = np.flatnonzero(expected != found)
    return Comparison(
        probes=len(probes.probes),
        positions=len(owners),
        mean_kl=float(divergences.mean()),
        worst_kl=float(divergences.max()),
        top1=1 - len(differing) / len(owners),
        labels=_labels(probes, reference, candidate) if probes.labels else None,
        worst=place(int(divergences.argmax())),
        first=place(int(differing[0])) if len(differing) else None,
    )


def _divergences(reference: Distributions, candidate: Distributions) -> tuple[Any, Any, Any]:
    """Return per position the divergence in nats and both likeliest tokens.

    Row by row, because all rows in double precision would take four times the file. Rounding to float16
    leaves sums that are not quite 1, so each row is normalised again.
    """
    size = len(reference.rows)
    divergences, expected, found = np.zeros(size), np.zeros(size, int), np.zeros(size, int)
    for row in range(size):
        ours, theirs = (
            log_softmax(reference.rows[row : row + 1])[0],
            log_softmax(candidate.rows[row : row + 1])[0],
        )
        divergences[row] = max(0.0, float((np.exp(ours) * (ours - theirs)).sum()))
        expected[row], found[row] = ours.argmax(), theirs.argmax()
    return divergences, expected, found


def _labels(probes: Probes, reference: Distributions, candidate: Distributions) -> Labels:
    right = np.array([probe.label for probe in probes.probes])
    ours, theirs = reference.labels.argmax(axis=1), candidate.labels.argmax(axis=1)
    lost = int(((ours == right) & (theirs != right)).sum())
    gained = int(((ours != right) & (theirs == right)).sum())
    return Labels(int((ours != theirs).sum()), lost, gained, mcnemar(lost, gained))


def mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    If neither model were better, each of the ``lost + gained`` answers that only one of them got right
    would fall to either side like a fair coin. McNemar (1947), "Note on the sampling error of the
    difference between correlated proportions or percentages"; the exact binomial form, which holds for
    few answers too. Whole numbers and ``math.comb`` are exact, and SciPy is in none of these images.
    """
    count = lost + gained
    tail = sum(comb(count, number) for number in range(min(lost, gained) + 1))
    return min(1.0, float(Fraction(2 * tail, 1 << count)))


def _check_shapes(probes: Probes, reference: Distributions, candidate: Distributions) -> None:
    if not probes.digest == reference.probes == candidate.probes:
        raise BadDataError(
            "the distributions belong to another probe set than probes.json: an artifact's files were mixed"
        )
    positions = sum(len(probe.positions) for probe in probes.probes)
    if len(reference.rows) != positions or reference.labels.shape != (len(probes.probes), probes.labels):
        raise BadDataError("parity.npz does not fit probes.json: an artifact's files were mixed")
    if reference.rows.shape != candidate.rows.shape or reference.labels.shape != candidate.labels.shape:
        raise BadDataError(
            f"the model has a vocabulary of {candidate.rows.shape[1]} tokens, and the one it was made from "
            f"{reference.rows.shape[1]}: the embeddings are another model's"
        )

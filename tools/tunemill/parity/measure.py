"""Puts the probe set to a model, whatever computes it: transformers or llama.cpp.

Only this module decides what is computed; an ``Engine`` turns tokens into logits. So two engines'
answers differ by their arithmetic and their weights, and by nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tunemill.errors import BadDataError
from tunemill.parity.distributions import Distributions, Doubles, Halves
from tunemill.parity.probes import Probe, Probes, Text

LOWEST = float(np.finfo(np.float16).min)
AT_ONCE = (
    4  # labels read together: a trained model is mostly sure after these, and each has a cache of its own
)

Logits = npt.NDArray[np.float32]


class Engine(Protocol):
    """One model, ready to compute."""

    def read(self, tokens: Sequence[int], wanted: Sequence[int]) -> Logits:
        """Read a prompt anew; return ``(wanted, vocabulary)`` logits after those of its tokens."""

    def go_on(self, texts: Sequence[Sequence[int]]) -> list[Logits]:
        """Return for each of up to ``AT_ONCE`` texts after the prompt the logits after each of its tokens."""


def measure(engine: Engine, probes: Probes, tick: Callable[[], None] = lambda: None) -> Distributions:
    """Return the distributions of all probes; ``tick`` is called after each.

    Raises:
        BadDataError: the model computes values that are no numbers; the message names the probe.
    """
    rows, labels = [], np.zeros((len(probes.probes), probes.labels))
    for number, probe in enumerate(probes.probes):
        found, labels[number] = _answer(engine, probe)
        rows.append(found)
        tick()
    return Distributions(probes.digest, np.concatenate(rows), labels)


def _answer(engine: Engine, probe: Probe) -> tuple[Halves, Doubles]:
    last = len(probe.prompt.tokens) - 1
    before = [place for place in probe.positions if place < last]
    read = _finite(engine.read(probe.prompt.tokens, [*before, last]), probe)
    after = [place - last - 1 for place in probe.positions if place > last]
    rows = [read[: len(before)], read[-1:]] if last in probe.positions else [read[: len(before)]]
    if after:
        gone_on = engine.go_on([probe.answer.tokens[: after[-1] + 1]])[0]
        rows.append(_finite(gone_on[after], probe))
    probabilities = log_softmax(np.concatenate(rows))
    return np.maximum(probabilities, LOWEST).astype(np.float16), _likelihoods(engine, probe, read[-1])


def _likelihoods(engine: Engine, probe: Probe, after_prompt: Logits) -> Doubles:
    """Return the log-likelihood of each label's tokens given the prompt, as far as it can be the best.

    A label is no likelier than its first token. So they are taken in the order of that bound, and once
    the best found is above the bounds of all others these keep theirs.
    """
    first = log_softmax(after_prompt[None])[0]
    found = np.array([first[label.tokens[0]] for label in probe.labels], np.float64)
    order = np.argsort(-found, kind="stable")
    best = -np.inf
    for start in range(0, len(order), AT_ONCE):
        chosen = [number for number in order[start : start + AT_ONCE] if found[number] > best]
        longer = [number for number in chosen if len(probe.labels[number].tokens) > 1]
        scores = _rest(engine, [probe.labels[number] for number in longer], probe)
        for number, score in zip(longer, scores, strict=True):
            found[number] += score
        best = max([best, *(found[number] for number in chosen)])
    return found


def _rest(engine: Engine, labels: Sequence[Text], probe: Probe) -> list[float]:
    """Return the log-likelihood of each label's tokens but the first."""
    if not labels:
        return []
    logits = engine.go_on([label.tokens[:-1] for label in labels])
    scores = []
    for label, rows in zip(labels, logits, strict=True):
        probabilities = log_softmax(_finite(rows, probe))
        scores.append(float(probabilities[range(len(rows)), label.tokens[1:]].sum()))
    return scores


def _finite(logits: Logits, probe: Probe) -> Logits:
    # Minus infinity is a token that the model rules out.
    if np.isnan(logits).any() or np.isposinf(logits).any():
        raise BadDataError(f"the model computes no numbers for {probe.origin}: its weights are damaged")
    return logits


def log_softmax(logits: npt.NDArray[np.floating]) -> Doubles:
    """Return ``(n, vocabulary)`` log-probabilities in nats of logits, in double precision."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted

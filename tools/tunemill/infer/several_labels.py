"""Answers of the form ``labels``: the likeliest set of up to ``max_labels`` labels.

Every answer that the task allows, a sequence of different labels, has its exact log-likelihood. First
all single labels are computed, then what goes on after those that are likely to go on, and so on. What is
left out is bounded: a stem's probability is an upper bound of all answers that begin with it, so the
likeliest stems are gone on from until the others together have at most ``max_pruned`` of the
probability. No probability is off by more than ``pruned``, which each answer carries.

The order in which a model names labels says nothing of a text, so a set's probability is that of all
its orders, and the predicted set is the one most likely to be exactly right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tunemill.infer.classify import Question
from tunemill.infer.one_label import scores
from tunemill.infer.pruning import Floats
from tunemill.infer.rows import Answer
from tunemill.infer.run import Run
from tunemill.infer.sequences import Chosen, Level, Sequences
from tunemill.task import Task

MAX_PRUNED = 0.01
"""Where ``max_pruned`` is not given: to compute all answers would take minutes for each text."""


@dataclass
class _Found:
    """What is known so far of one question."""

    number: int
    """Which question it is."""
    prompt: tuple[int, ...]
    sequences: Sequences
    beginnings: tuple[Chosen, ...] = ((),)
    """What the next level goes on from."""
    nats: dict[Chosen, float] = field(default_factory=dict)
    """Log-likelihood of every answer computed."""
    stems: dict[Chosen, float] = field(default_factory=dict)
    """Log-likelihood of every stem that was not gone on from."""

    def take(self, level: Level, found: Floats, max_pruned: float) -> None:
        """Add a level's scores, and choose after what the next one goes on."""
        answers = len(level.answers)
        self.nats.update(zip(level.answers, found[:answers].tolist(), strict=True))
        self.stems.update(zip(level.beginnings, found[answers : level.scored].tolist(), strict=True))
        ascending = sorted(self.stems, key=self.stems.__getitem__)
        highest = max([*self.nats.values(), *self.stems.values()])
        shares = np.exp(np.array([self.stems[chosen] for chosen in ascending]) - highest)
        total = shares.sum() + np.exp(np.array(list(self.nats.values())) - highest).sum()
        left_out = int((np.cumsum(shares) <= max_pruned * total).sum())
        self.beginnings = tuple(sorted(ascending[left_out:]))
        for chosen in self.beginnings:
            del self.stems[chosen]


def answer(run: Run, questions: Sequence[Question], _numbers: Sequence[int]) -> Iterator[tuple[int, Answer]]:
    """Yield each question's number and its answer, as soon as there is one."""
    going_on = [
        _Found(number, one.prompt, one.sequences) for number, one in enumerate(questions) if one.sequences
    ]
    max_pruned = MAX_PRUNED if run.config.max_pruned is None else run.config.max_pruned
    while going_on:
        levels = [one.sequences.after(one.beginnings) for one in going_on]
        asked = [Question(one.prompt, level.tries) for one, level in zip(going_on, levels, strict=True)]
        for place, nats, _ in scores(run, asked, max(level.scored for level in levels), 0):
            one = going_on[place]
            one.take(levels[place], nats, max_pruned)
            if not one.beginnings:
                yield one.number, _likeliest(one, run.task)
        going_on = [one for one in going_on if one.beginnings]


def _likeliest(found: _Found, task: Task) -> Answer:
    """Return the likeliest set, in the order of its likeliest sequence."""
    highest = max(found.nats.values())
    shares = {chosen: float(np.exp(nats - highest)) for chosen, nats in found.nats.items()}
    total = sum(shares.values())
    sets: dict[frozenset[int], float] = {}
    for chosen, share in shares.items():
        sets[frozenset(chosen)] = sets.get(frozenset(chosen), 0.0) + share / total
    best = max(sets, key=sets.__getitem__)
    order = max((chosen for chosen in shares if frozenset(chosen) == best), key=shares.__getitem__)
    pruned = float(np.exp(np.array(list(found.stems.values())) - highest).sum())
    return Answer(
        found.sequences.text(order),
        sets[best],
        tuple(
            sum(share for chosen, share in sets.items() if label in chosen)
            for label in range(len(task.labels))
        ),
        labels=tuple(task.labels[label] for label in order),
        pruned=pruned / (total + pruned),
    )

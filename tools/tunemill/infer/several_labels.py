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

from tunemill.infer.classify import Question, scores_after
from tunemill.infer.engine import Engine
from tunemill.infer.pruning import Floats
from tunemill.infer.rows import Answer
from tunemill.infer.run import Run, common_beginning
from tunemill.infer.sequences import NODES, Chosen, Level, Sequences
from tunemill.task import Task

MAX_PRUNED = 0.01
"""Where ``max_pruned`` is not given: to compute all answers would take minutes for each text."""


@dataclass
class _Found:
    """What is known so far of one question."""

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
        self.stems.update(zip(level.beginnings, found[answers:].tolist(), strict=True))
        ascending = sorted(self.stems, key=self.stems.__getitem__)
        highest = max([*self.nats.values(), *self.stems.values()])
        shares = np.exp(np.array([self.stems[chosen] for chosen in ascending]) - highest)
        total = shares.sum() + np.exp(np.array(list(self.nats.values())) - highest).sum()
        left_out = int((np.cumsum(shares) <= max_pruned * total).sum())
        self.beginnings = tuple(sorted(ascending[left_out:]))
        for chosen in self.beginnings:
            del self.stems[chosen]


def answer(run: Run, questions: Sequence[Question], _numbers: Sequence[int]) -> Iterator[tuple[int, Answer]]:
    """Yield each question's number and its answer, in any order."""
    max_pruned = MAX_PRUNED if run.config.max_pruned is None else run.config.max_pruned
    prompts = [question.prompt for question in questions]
    run.pool.share(common_beginning(prompts), max(map(_cells, questions)))

    def found(engine: Engine, number: int) -> tuple[int, Answer]:
        return number, _likeliest(_searched(engine, questions[number], max_pruned), run.task)

    yield from run.pool.each(found, sorted(range(len(questions)), key=lambda number: prompts[number]))


def _sequences(question: Question) -> Sequences:
    if question.sequences is None:
        raise TypeError("a question of this form says what answers there are")
    return question.sequences


def _cells(question: Question) -> int:
    return len(question.prompt) + max(NODES, _sequences(question).longest)


def _searched(engine: Engine, question: Question, max_pruned: float) -> _Found:
    found = _Found(_sequences(question))
    while found.beginnings:
        level = found.sequences.after(found.beginnings)
        found.take(level, scores_after(engine, question.prompt, level.tries, level.scored), max_pruned)
    return found


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

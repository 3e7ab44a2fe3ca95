"""Answers of the form ``label``: the likeliest label of the set, with the probabilities of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tunemill.infer import classify
from tunemill.infer.pruning import Flags, Floats
from tunemill.infer.rows import Answer
from tunemill.infer.run import Run, common_beginning


def answer(
    run: Run, questions: Sequence[classify.Question], _numbers: Sequence[int]
) -> Iterator[tuple[int, Answer]]:
    """Yield each question's number and its answer, in any order."""
    labels = run.task.labels
    for number, found, unknown in scores(run, questions, len(labels), run.config.max_pruned or 0.0):
        shares = classify.probabilities(found)
        best = int(shares.argmax())
        pruned = float(shares[unknown].sum())
        yield number, Answer(labels[best], float(shares[best]), tuple(shares.tolist()), pruned=pruned)


def scores(
    run: Run, questions: Sequence[classify.Question], count: int, max_pruned: float
) -> Iterator[tuple[int, Floats, Flags]]:
    """Yield each question's number, its ``(count,)`` log-likelihoods, and which of them are not known."""
    prefix = common_beginning([question.prompt for question in questions])
    run.pool.share(prefix, classify.cells(questions, max_pruned))
    yield from classify.score(run.pool, questions, count, max_pruned)

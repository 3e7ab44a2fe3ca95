"""Answers of the form ``label``: the likeliest label of the set, with the probabilities of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tunemill.infer import classify
from tunemill.infer.rows import Answer
from tunemill.infer.run import Run, common_beginning


def answer(
    run: Run, questions: Sequence[classify.Question], _numbers: Sequence[int]
) -> Iterator[tuple[int, Answer]]:
    """Yield each question's number and its answer, in any order."""
    labels = run.task.labels
    for number, found in scores(run, questions, len(labels)):
        shares = classify.probabilities(found)
        best = int(shares.argmax())
        yield number, Answer(labels[best], float(shares[best]), tuple(shares.tolist()))


def scores(
    run: Run, questions: Sequence[classify.Question], count: int
) -> Iterator[tuple[int, classify.Floats]]:
    """Yield each question's number and the log-likelihoods, ``(count,)``, of what its tries hold."""
    prefix = common_beginning([question.prompt for question in questions])
    run.pool.share(prefix, classify.cells(questions))
    yield from classify.score(run.pool, questions, count)

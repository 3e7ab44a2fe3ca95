"""Answers of the form ``label``: the likeliest label of the set, with the probabilities of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tunemill.infer import classify
from tunemill.infer.rows import Answer
from tunemill.infer.run import Run, common_beginning


def answer(run: Run, questions: Sequence[classify.Question], _numbers: Sequence[int]) -> Iterator[Answer]:
    """Yield the answer to each question, in order."""
    labels = run.task.labels
    for _, found in scores(run, questions, len(labels)):
        shares = classify.probabilities(found)
        best = int(shares.argmax())
        yield Answer(labels[best], float(shares[best]), tuple(shares.tolist()))


def scores(
    run: Run, questions: Sequence[classify.Question], count: int
) -> Iterator[tuple[int, classify.Floats]]:
    """Yield each question's number and the log-likelihoods, ``(count,)``, of what its tries hold."""
    largest = max(classify.cells(question) for question in questions)
    prefix = common_beginning([question.prompt for question in questions])
    run.pool.share(prefix, len(prefix) + max(run.config.n_batch, largest))
    yield from classify.score(run.pool, questions, count)

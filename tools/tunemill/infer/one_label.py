"""Answers of the form ``label``: the likeliest label of the set, with the probabilities of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tunemill.infer import classify
from tunemill.infer.rows import Answer
from tunemill.infer.run import Run, common_beginning


def answer(run: Run, questions: Sequence[classify.Question], _numbers: Sequence[int]) -> Iterator[Answer]:
    """Yield the answer to each question, in order."""
    labels = run.task.labels
    largest = max(classify.cells(question) for question in questions)
    prefix = common_beginning([question.prompt for question in questions])
    run.pool.share(prefix, len(prefix) + max(run.config.n_batch, largest))
    for _, scores in classify.score(run.pool, questions, len(labels)):
        shares = classify.probabilities(scores)
        best = int(shares.argmax())
        yield Answer(labels[best], float(shares[best]), tuple(shares.tolist()))

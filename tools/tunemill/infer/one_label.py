"""Answers of the form ``label``: one of the set, with the probabilities of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tunemill.infer import classify
from tunemill.infer.rows import Answer
from tunemill.infer.run import Run, common_beginning


def answer(
    run: Run, questions: Sequence[classify.Question], _numbers: Sequence[int]
) -> Iterator[tuple[int, Answer]]:
    """Yield each question's number and its answer, in any order."""
    labels, max_pruned = run.task.labels, run.config.max_pruned or 0.0
    run.pool.share(
        common_beginning([question.prompt for question in questions]), classify.cells(questions, max_pruned)
    )
    greedy = run.config.decoding == "greedy"
    for number, found in classify.score(run.pool, questions, len(labels), max_pruned, greedy):
        shares = classify.probabilities(found.nats)
        best = int(shares.argmax()) if found.written is None else found.written
        pruned = float(shares[found.left_out].sum())
        yield number, Answer(labels[best], float(shares[best]), tuple(shares.tolist()), pruned=pruned)

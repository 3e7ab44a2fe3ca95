"""Single rows answered to be looked at: nothing is published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tunemill.errors import UsageError
from tunemill.infer.config import InferConfig
from tunemill.infer.predict import answer_block, opened
from tunemill.infer.rows import Answer, Row, Rows
from tunemill.work import Work


@dataclass(frozen=True)
class Sample:
    """One row with its answer."""

    row: Row
    prompt: str
    """As the model reads it, with all special tokens; the messages' text where it cannot be rendered."""
    answer: Answer
    probabilities: tuple[tuple[str, float], ...]
    """Labels with their probabilities, the likeliest first."""


def answer_samples(work: Work[InferConfig], ids: Sequence[str]) -> Iterator[Sample]:
    """Yield the named rows of the split with their answers, in the order of ``ids``.

    Raises:
        UsageError: the split has no row of a name.
    """
    numbered = _find(Rows(work.inputs["data"].path, work.config.split, 0), work.config, ids)
    with opened(work) as (run, _), work.progress.task("infer", len(ids), "rows") as task:
        for name in ids:
            number, row = numbered[name]
            answer = answer_block(run, [row], number, task)[0]
            ranked = zip(run.task.labels, answer.probabilities or (), strict=False)
            yield Sample(row, run.asker.prompt(row), answer, tuple(sorted(ranked, key=lambda pair: -pair[1])))


def _find(rows: Rows, config: InferConfig, ids: Sequence[str]) -> dict[str, tuple[int, Row]]:
    wanted, found = set(ids), dict[str, tuple[int, Row]]()
    for block, some in rows.blocks(config.block_rows):
        for place, row in enumerate(some):
            if row.id in wanted:
                found[row.id] = (block * config.block_rows + place, row)
    if missing := [name for name in ids if name not in found]:
        raise UsageError(
            f"the split {config.split} has no row {missing[0]!r}: choose --set split=… or another id"
        )
    return found

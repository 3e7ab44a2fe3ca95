"""Rows in, predictions out, in blocks that survive a kill.

A block is the predictions of ``block_rows`` consecutive rows in a file of its own, written
atomically; then a line in the journal names it with its digest. After a kill the journal's whole
lines whose files still match are taken as they are, and the first missing block is computed again.
A block depends on its own rows alone, so the joined file has the same bytes however often the work
was interrupted, and whichever machines computed its blocks.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tunemill.errors import BadDataError
from tunemill.files import atomic_write, disk_errors, sha256_file
from tunemill.prompting import Message

SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("text", pyarrow.string()),
        ("label", pyarrow.string()),
        ("probability", pyarrow.float64()),
        ("gold", pyarrow.string()),
        ("probabilities", pyarrow.list_(pyarrow.float64())),
        ("error", pyarrow.string()),
        ("ended", pyarrow.bool_()),
        ("item", pyarrow.string()),
        ("dimension", pyarrow.string()),
        ("labels", pyarrow.list_(pyarrow.string())),
        ("golds", pyarrow.list_(pyarrow.string())),
        ("logprob", pyarrow.float64()),
        ("samples", pyarrow.list_(pyarrow.string())),
        ("sample_logprobs", pyarrow.list_(pyarrow.float64())),
        ("pruned", pyarrow.float64()),
    ]
)
"""``item`` and ``dimension``: which text a row is about, and what of it, where texts are rated on several
dimensions. ``labels`` and ``golds``: the predicted and the true labels where a text may have several;
``label`` and ``gold`` are then those, joined. ``logprob``: nats of a free answer; ``samples``: further
answers to the same prompt, ``sample_logprobs`` their nats. ``pruned``: how far off the probabilities of
labels may be."""
NEEDED = ("id", "prompt", "completion", "text", "label")
OPTIONAL = ("item", "dimension", "labels")


@dataclass(frozen=True)
class Row:
    """One text to predict."""

    id: str
    text: str
    messages: tuple[Message, ...]
    gold: str | None
    """The label's name, or the wanted free answer; None of a text that is only to be predicted."""
    item: str | None = None
    """The text's own id, where the row asks about one dimension of it."""
    dimension: str | None = None
    golds: tuple[str, ...] | None = None
    """The true labels, where there may be several."""


@dataclass(frozen=True)
class Answer:
    """What became of one row: a label or text, or the reason why there is none."""

    label: str | None = None
    probability: float | None = None
    probabilities: tuple[float, ...] | None = None
    error: str | None = None
    ended: bool | None = None
    """Of a free answer: the model ended it itself, before ``max_new_tokens``."""
    labels: tuple[str, ...] | None = None
    """The predicted labels, where there may be several; ``label`` is then these, joined."""
    logprob: float | None = None
    """Of a free answer: its log-likelihood in nats, over all its tokens."""
    samples: tuple[str | None, ...] | None = None
    """Further answers to the same prompt; None for one that is not as asked for."""
    sample_logprobs: tuple[float, ...] | None = None
    """The log-likelihoods of ``samples``."""
    pruned: float | None = None
    """The largest share that labels left uncomputed can have together."""


class Rows:
    """One split of a prepared dataset.

    Raises:
        BadDataError: the split is absent, empty, or not what ``prepare`` writes.
    """

    def __init__(self, data: Path, split: str, limit: int) -> None:
        path = data / f"{split}.parquet"
        if not path.exists():
            there = ", ".join(sorted(found.stem for found in data.glob("*.parquet"))) or "none"
            raise BadDataError(f"the data has no split {split}: choose split from {there}")
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise BadDataError(
                f"{path.name} is no Parquet file: {_line(error)}; run prepare again"
            ) from error
        if absent := [name for name in NEEDED if name not in self._file.schema_arrow.names]:
            raise BadDataError(f"{path.name} lacks the column {absent[0]}: run prepare again")
        rows = self._file.metadata.num_rows
        self._name = path.name
        self._columns = [*NEEDED, *(name for name in OPTIONAL if name in self._file.schema_arrow.names)]
        self.count = min(rows, limit) if limit else rows
        if not self.count:
            raise BadDataError(f"{path.name} has no rows")

    def blocks(self, size: int, index: int = 0, count: int = 1) -> Iterator[tuple[int, list[Row]]]:
        """Yield every ``count``-th block of ``size`` rows from block ``index`` on, with its number.

        The last block of all is shorter. One is in memory at a time.

        Raises:
            BadDataError: the file is damaged.
        """
        left = self.count
        try:
            for number, batch in enumerate(self._file.iter_batches(size, columns=self._columns)):
                if number % count == index:
                    yield number, [_row(values) for values in batch.to_pylist()[:left]]
                left -= len(batch)
                if left <= 0:
                    return
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise BadDataError(f"{self._name} is damaged: {_line(error)}; run prepare again") from error

    def count_of(self, size: int, index: int = 0, count: int = 1) -> int:
        """Return how many rows ``blocks`` yields."""
        return sum(min(size, self.count - start) for start in range(index * size, self.count, count * size))


class Blocks:
    """The finished blocks of one run, in its scratch directory.

    ``identity`` says what the blocks were made from; those of anything else are thrown away.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self._directory = directory
        self._journal = directory / "journal.jsonl"
        head = json.dumps(identity, sort_keys=True)
        lines = self._lines()
        if lines[:1] != [head]:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            lines = [head]
        self.finished = self._intact(lines[1:])
        with atomic_write(self._journal) as target:  # drops a torn last line and what follows a bad one
            target.write("".join(f"{line}\n" for line in lines[: self.finished + 1]).encode())

    def add(self, rows: Sequence[Row], answers: Sequence[Answer]) -> None:
        """Save the next block; it counts once its journal line is on the disk."""
        path = self._path(self.finished)
        with atomic_write(path) as target:
            pyarrow.parquet.write_table(_table(rows, answers), target)
        line = json.dumps({"block": self.finished, "rows": len(rows), "sha256": sha256_file(path)})
        with disk_errors(self._journal), self._journal.open("a") as journal:
            journal.write(line + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.finished += 1

    def join(self, target: Path) -> None:
        """Write all blocks as one Parquet file, a row group each."""
        with atomic_write(target) as sink, pyarrow.parquet.ParquetWriter(sink, SCHEMA) as writer:
            for block in range(self.finished):
                writer.write_table(pyarrow.parquet.read_table(self._path(block), schema=SCHEMA))

    def tables(self) -> Iterator[Any]:
        """Yield each finished block as a table."""
        for block in range(self.finished):
            yield pyarrow.parquet.read_table(self._path(block), schema=SCHEMA)

    def _lines(self) -> list[str]:
        if not self._journal.exists():
            return []
        whole = self._journal.read_bytes().decode(errors="replace").rpartition("\n")[0]
        return whole.split("\n")

    def _intact(self, lines: Sequence[str]) -> int:
        for block, line in enumerate(lines):
            try:
                entry = json.loads(line)
            except ValueError:
                return block
            path = self._path(block)
            if entry.get("block") != block or not path.exists() or sha256_file(path) != entry.get("sha256"):
                return block
        return len(lines)

    def _path(self, block: int) -> Path:
        return self._directory / f"{block:06d}.parquet"


def _row(values: Mapping[str, Any]) -> Row:
    messages = tuple({"role": one["role"], "content": one["content"]} for one in values["prompt"])
    gold = values["label"] if values["label"] is not None else values["completion"] or None
    golds = values.get("labels")
    return Row(
        values["id"],
        values["text"] or "",
        messages,
        gold,
        values.get("item"),
        values.get("dimension"),
        None if golds is None else tuple(golds),
    )


def _table(rows: Sequence[Row], answers: Sequence[Answer]) -> Any:
    columns = {
        "id": [row.id for row in rows],
        "text": [row.text for row in rows],
        "label": [answer.label for answer in answers],
        "probability": [answer.probability for answer in answers],
        "gold": [row.gold for row in rows],
        "probabilities": [answer.probabilities for answer in answers],
        "error": [answer.error for answer in answers],
        "ended": [answer.ended for answer in answers],
        "item": [row.item for row in rows],
        "dimension": [row.dimension for row in rows],
        "labels": [answer.labels for answer in answers],
        "golds": [row.golds for row in rows],
        "logprob": [answer.logprob for answer in answers],
        "samples": [answer.samples for answer in answers],
        "sample_logprobs": [answer.sample_logprobs for answer in answers],
        "pruned": [answer.pruned for answer in answers],
    }
    return pyarrow.table(columns, schema=SCHEMA)


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0]

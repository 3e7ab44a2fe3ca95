"""The data artifact as token ids: what the model reads, and which of it the loss counts.

Prompt and completion are tokenized apart and joined, as inference joins a prompt and a label:
so the ids of a prompt are the same in both, even where a tokenizer would merge across the seam.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunemill.errors import BadDataError, UsageError
from tunemill.prompting import Prompting

COLUMNS = ("id", "prompt", "completion")
BATCH = 1000


@dataclass(frozen=True)
class Encoded:
    """One split of the data, tokenized; lists of equal length, one entry a row."""

    input_ids: list[list[int]]
    completion_mask: list[list[int]]
    """1 for the tokens of the completion, which the loss counts."""

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(map(len, self.input_ids))

    def dataset(self) -> Any:
        """Return it as a ``datasets.Dataset`` that TRL takes for tokenized already."""
        from datasets import Dataset

        return Dataset.from_dict(
            {
                "input_ids": self.input_ids,
                "completion_mask": self.completion_mask,
                "length": list(map(len, self.input_ids)),
            }
        )


def read_split(directory: Path, split: str) -> list[dict[str, Any]] | None:
    """Return the rows of ``<split>.parquet`` with id, prompt and completion; None if there is none.

    Raises:
        BadDataError: the file is damaged or lacks a column.
    """
    import pyarrow
    import pyarrow.parquet

    path = directory / f"{split}.parquet"
    if not path.exists():
        return None
    try:
        missing = sorted(set(COLUMNS) - set(pyarrow.parquet.read_schema(path).names))
        if missing:
            raise BadDataError(f"{path.name} of the data lacks {', '.join(missing)}: make it with prepare")
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path, columns=list(COLUMNS)).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise BadDataError(f"{path.name} of the data cannot be read: {_first_line(error)}") from error
    return rows


def draw(rows: Sequence[Mapping[str, Any]], count: int | None, seed: int) -> list[Mapping[str, Any]]:
    """Return ``count`` rows in their order, or all for None; what a seed draws holds its smaller draws.

    Rows are ranked by a hash of seed and id, so that neither their order nor what else is there matters.

    Raises:
        UsageError: there are fewer.
    """
    if count is None:
        return list(rows)
    if count > len(rows):
        raise UsageError(
            f"max_train_samples={count} is more than the {len(rows)} rows of the train split: "
            "leave it out to train on all of them"
        )
    ranks = [hashlib.sha256(f"{seed}:{row['id']}".encode()).digest() for row in rows]
    drawn = sorted(range(len(rows)), key=ranks.__getitem__)[:count]
    return [rows[place] for place in sorted(drawn)]


def encode(
    rows: Sequence[Mapping[str, Any]], prompting: Prompting, tokenizer: Any, max_length: int | None
) -> Encoded:
    """Tokenize rows; a row longer than ``max_length`` is an error, never cut.

    Raises:
        BadDataError: there are no rows, or one is empty or too long; names it.
    """
    if not rows:
        raise BadDataError("the data have no rows to train on: look at their data card")
    input_ids, masks = [], []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        _check_answered(batch)
        prompts = _tokenize(tokenizer, [prompting.prompt(row["prompt"]) for row in batch])
        completions = _tokenize(
            tokenizer, [prompting.completion(row["prompt"], row["completion"]) for row in batch]
        )
        for row, prompt, completion in zip(batch, prompts, completions, strict=True):
            _check_length(row, len(prompt) + len(completion), max_length)
            input_ids.append(prompt + completion)
            masks.append([0] * len(prompt) + [1] * len(completion))
    return Encoded(input_ids, masks)


def _tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _check_answered(rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        if not row["completion"] or not row["prompt"]:
            raise BadDataError(f"row {row['id']} has no {'question' if row['completion'] else 'answer'}")


def _check_length(row: Mapping[str, Any], length: int, max_length: int | None) -> None:
    if max_length is not None and length > max_length:
        raise BadDataError(
            f"row {row['id']} has {length} tokens, more than max_length={max_length}: "
            "prepare and train with the same max_length"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

"""Texts of the task that decide how GPTQ rounds: training prompts with their answers, never test rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunemill.errors import BadDataError
from tunemill.prompting import Prompting

COLUMNS = ["prompt", "completion"]


def calibration(data: Path, prompting: Prompting, tokenizer: Any, count: int) -> list[dict[str, list[int]]]:
    """Return token ids of ``count`` rows, evenly spread over the training split, as training reads them.

    Prompt and completion are tokenized apart and joined. Fewer rows are returned where there are fewer.

    Raises:
        BadDataError: the training split is missing, empty, or not as prepare writes it.
    """
    rows = _rows(data / "train.parquet")
    chosen = [rows[place * len(rows) // count] for place in range(count)] if count < len(rows) else rows
    found = []
    for row in chosen:
        texts = (prompting.prompt(row["prompt"]), prompting.completion(row["prompt"], row["completion"]))
        ids = [token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)]
        found.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path, columns=COLUMNS).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise BadDataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not rows:
        raise BadDataError(f"{path} has no rows to calibrate on: look at the data card")
    return rows

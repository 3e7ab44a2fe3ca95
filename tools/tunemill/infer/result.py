"""What an inference leaves behind: the predictions, the task's labels, and a record of how it was made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from tunemill import task
from tunemill.errors import BadDataError
from tunemill.work import Facts

PREDICTIONS, RECORD = "predictions.parquet", "run.json"
CONTENT_FREE = "content_free"
"""In the record: the probabilities that answers were calibrated by."""
DESCRIPTION = (task.FILE, task.LABELS)
"""What says how predictions are to be read, as prepare wrote it."""


def tally(tables: Iterable[Any]) -> Facts:
    """Count the rows of some predictions, and what became of them."""
    rows, cut_off, reasons, pruned = 0, 0, Counter[str](), list[float]()
    for table in tables:
        rows += len(table)
        cut_off += sum(ended is False for ended in table["ended"].to_pylist())
        reasons.update(reason.split(":")[0] for reason in table["error"].to_pylist() if reason)
        pruned += [share for share in table["pruned"].to_pylist() if share is not None]
    return {
        "rows": rows,
        "errors": sum(reasons.values()),
        "cut_off": cut_off,
        "error_reasons": dict(sorted(reasons.items())),
        **({"most_pruned": max(pruned)} if pruned else {}),
    }


def refuse_none_predicted(tables: Iterable[Any], facts: Facts) -> None:
    """Refuse predictions of nothing.

    Raises:
        BadDataError: every row has an error; names the first.
    """
    if facts["errors"] == facts["rows"]:
        first = next(reason for table in tables for reason in table["error"].to_pylist())
        raise BadDataError(f"none of the {facts['rows']} rows can be predicted; the first: {first}")

"""The rows that prepare wrote, some at a time: a split may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tunemill.errors import BadDataError

ROWS_AT_ONCE = 1 << 14


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield each row's values of these columns, by name.

    Raises:
        BadDataError: the file is damaged or lacks a column.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as source:
            if absent := [name for name in columns if name not in source.schema_arrow.names]:
                raise BadDataError(f"{path.name} lacks the column {absent[0]}: run prepare again")
            for batch in source.iter_batches(ROWS_AT_ONCE, columns=list(columns)):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise BadDataError(f"{path.name} cannot be read ({reason}): run prepare again") from error

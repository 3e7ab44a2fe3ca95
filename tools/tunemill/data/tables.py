"""Reads one file into rows: jsonl, json, csv, tsv, parquet and xlsx, by its name's ending.

Every row knows where it came from, in the words a user would use to find it, so that an error
further on can name it. Cells keep their type; nothing is guessed about their meaning here.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from tunemill.data import tatqa
from tunemill.errors import BadDataError

LARGEST_FIELD = 16 << 20
"""Characters in one csv field; the library's own limit of 131,072 is less than a long report."""


UNLABELLED = "unlabelled"
"""The split of texts that have no answer and are only to be predicted."""


@dataclass(frozen=True)
class Row:
    """One row of a dataset, not yet interpreted."""

    where: str
    """For people: ``train.csv row 17``, counted from 1 without the header."""
    name: str
    """Identifier to use when the data have none: ``train-17``."""
    values: Mapping[str, Any]
    split: str | None = None
    """``train``, ``validation`` or ``test`` where the source says so, or ``unlabelled``."""

    @property
    def answered(self) -> bool:
        """Whether it has to have an answer."""
        return self.split != UNLABELLED


def read_table(path: Path) -> list[Row]:
    """Return a file's rows.

    Raises:
        BadDataError: it is malformed, not UTF-8, or of a kind that cannot be read.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise BadDataError(f"{path} is none of the kinds that can be read: {', '.join(READERS)}")
    unit = "line" if reader is _jsonl else "row"
    try:
        return [
            Row(f"{path.name} {unit} {number}", f"{path.stem}-{number}", values)
            for number, values in reader(path)
        ]
    except UnicodeDecodeError as error:
        raise BadDataError(f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8") from error
    except OSError as error:
        raise BadDataError(f"{path} cannot be read: {error.strerror or error}") from error


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _object(_json(line, f"{path.name} line {number}"), f"{path.name} line {number}")


def _json_list(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    value = _json(path.read_text("utf-8-sig"), path.name)
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise BadDataError(f"{path} holds no list of rows")
    rows: Iterable[Any] = value
    if tatqa.is_tatqa(value):
        rows = tatqa.rows(value, path.name)
    for number, row in enumerate(rows, 1):
        yield number, _object(row, f"{path.name} row {number}")


def _separated(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(LARGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        delimiter = _delimiter(lines.readline())
        lines.seek(0)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            yield from _records(path, reader)
        except csv.Error as error:
            raise BadDataError(f"{path.name} line {reader.line_num} is not csv: {error}") from error


def _records(path: Path, reader: Iterable[list[Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    header: list[str] | None = None
    number = 0
    for cells in reader:
        if not any(cell not in (None, "") for cell in cells):
            continue
        if header is None:
            header = _header(path, cells)
            continue
        number += 1
        if len(cells) != len(header):
            raise BadDataError(
                f"{path.name} row {number} has {len(cells)} fields, but the header names {len(header)}"
            )
        yield number, dict(zip(header, cells, strict=True))


def _header(path: Path, cells: list[Any]) -> list[str]:
    header = [str(cell if cell is not None else "").strip() for cell in cells]
    twice = {name for name in header if name and header.count(name) > 1}
    if twice:
        raise BadDataError(f"{path.name} has two columns named {sorted(twice)[0]!r}")
    return header


def _delimiter(header: str) -> str:
    """Spreadsheets of some countries separate with semicolons and still call it csv."""
    return max(",;\t", key=header.count)


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = [row for batch in file.iter_batches() for row in batch.to_pylist()]
    except pyarrow.ArrowException as error:
        raise BadDataError(f"{path} is not a whole parquet file: {_first_line(error)}") from error
    yield from enumerate(rows, 1)


def _xlsx(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import openpyxl
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (BadZipFile, InvalidFileException, KeyError, ValueError) as error:
        raise BadDataError(f"{path} is not a whole xlsx file: {_first_line(error)}") from error
    sheet = book.worksheets[0]
    rows = [list(cells) for cells in sheet.iter_rows(values_only=True)]
    book.close()
    width = max((n + 1 for cells in rows for n, cell in enumerate(cells) if cell is not None), default=0)
    yield from _records(path, [(cells + [None] * width)[:width] for cells in rows])


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadDataError(f"{where} is not JSON: {_first_line(error)}") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadDataError(f"{where} is no JSON object but {type(value).__name__}")
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


Reader = Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]

READERS: dict[str, Reader] = {
    ".jsonl": _jsonl,
    ".json": _json_list,
    ".csv": _separated,
    ".tsv": _separated,
    ".parquet": _parquet,
    ".xlsx": _xlsx,
}
"""What can be read, by the ending of the file's name."""

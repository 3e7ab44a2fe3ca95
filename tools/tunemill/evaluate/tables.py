"""Tables: the same rows for the page, for a spreadsheet and for a paper.

A cell is a value, and its column says what it is; how it is written is decided here for all three.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunemill.evaluate.figures import Interval

NONE = "\N{EN DASH}"
PERCENT, SHARE, POINTS, COUNT, NUMBER = "percent", "share", "points", "count", "number"
NAME, REFERENCE = "name", "reference"
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\N{MINUS SIGN}": "$-$",
    NONE: "--",
    "κ": r"$\kappa$",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


@dataclass(frozen=True)
class Column:
    """One column; cells are texts, numbers, intervals, or None where there is nothing."""

    key: str
    """In the CSV file; an interval's ends get ``_low`` and ``_high``."""
    title: str
    kind: str
    """name, reference (which may break anywhere), count, percent (of a share), share (three decimals), points
    (signed hundredths) or number."""


@dataclass(frozen=True)
class Table:
    """Rows under titled columns."""

    name: str
    """Of the CSV file."""
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]


def written(kind: str, value: Any) -> str:
    """Return a cell for people; of an interval the figure alone."""
    if isinstance(value, Interval):
        value = value.value
    if value is None:
        return NONE
    if kind == PERCENT:
        return f"{100 * value:.1f} %"
    if kind == POINTS:
        return f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")
    if kind == SHARE:
        return f"{value:.3f}".replace("-", "\N{MINUS SIGN}")
    return f"{value:.3g}" if kind == NUMBER else str(value)


def spread(kind: str, value: Any) -> str:
    """Return the range of an interval, such as ``70.3 to 78.8``; nothing for other cells."""
    if not isinstance(value, Interval):
        return ""
    low, high = (written(kind, end).removesuffix(" %") for end in (value.low, value.high))
    return f"{low} to {high}"


def as_csv(table: Table) -> str:
    """Return the table with full precision, one column for each end of an interval."""
    intervals = [any(isinstance(row[n], Interval) for row in table.rows) for n in range(len(table.columns))]
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(
        name
        for column, ranged in zip(table.columns, intervals, strict=True)
        for name in ([column.key, f"{column.key}_low", f"{column.key}_high"] if ranged else [column.key])
    )
    for row in table.rows:
        writer.writerow(
            value for cell, ranged in zip(row, intervals, strict=True) for value in _values(cell, ranged)
        )
    return target.getvalue()


def as_latex(table: Table) -> str:
    """Return a ``table`` environment for the package booktabs, every text of it escaped."""
    columns = "".join("l" if column.kind in (NAME, REFERENCE) else "r" for column in table.columns)
    titles = " & ".join(escaped(column.title) for column in table.columns)
    lines = [" & ".join(map(_latex_cell, table.columns, row)) + r" \\" for row in table.rows]
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{escaped(table.caption)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            titles + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def latex_file(tables: Sequence[Table]) -> str:
    """Return all tables as one file to ``\\input``."""
    return "% needs \\usepackage{booktabs}\n" + "\n\n".join(map(as_latex, tables)) + "\n"


def escaped(text: str) -> str:
    """Return a text with LaTeX's own signs made harmless, on one line."""
    return "".join(LATEX.get(sign, sign) for sign in " ".join(text.split()))


def _values(cell: Any, ranged: bool) -> tuple[Any, ...]:
    if isinstance(cell, Interval):
        return cell.value, cell.low, cell.high
    value = "" if cell is None else cell
    return (value, "", "") if ranged else (value,)


def _latex_cell(column: Column, value: Any) -> str:
    figure = escaped(written(column.kind, value))
    between = spread(column.kind, value)
    if not between:
        return figure
    low, high = between.split(" to ")
    return f"{figure} [{escaped(low)}, {escaped(high)}]"

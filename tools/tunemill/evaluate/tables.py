"""Tables: the same rows for the page, for a spreadsheet and for a paper.

A cell is a value, and its column says what it is; how it is written is decided here for all three.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Sequence
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
    "<": r"\textless{}",  # by themselves these three are other signs in LaTeX's first encoding
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    '"': r"{\char34}",  # by itself it changes the letter after it in a German text
    "[": "{[}",  # by themselves these two belong to the end of the line before
    "*": "{*}",
    "\N{MINUS SIGN}": "$-$",
    NONE: r"\textendash{}",
    "κ": r"$\kappa$",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}
DASHES = re.compile("-(?=-)")
PREAMBLE = r"""% needs \usepackage{booktabs,graphicx}
\providecommand{\tunemilltable}[1]{% no wider than a line, and no taller than a page
  \resizebox*{!}{\ifdim\totalheight>.8\textheight .8\textheight\else\totalheight\fi}{%
    \resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{#1}}}
"""
BESIDE = 2
"""Columns of ranges that stand beside their figures on a line; more of them stand below."""


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
    """Return a ``table`` environment for booktabs and ``PREAMBLE``, every text of it escaped."""
    columns = "".join("l" if column.kind in (NAME, REFERENCE) else "r" for column in table.columns)
    ranged = sum(any(isinstance(row[n], Interval) for row in table.rows) for n in range(len(table.columns)))
    titles, *rows = _beside(table) if ranged <= BESIDE else _below(table)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escaped(table.caption)}}}",
            r"\smallskip",
            rf"\tunemilltable{{\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            titles,
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
        ]
    )


def latex_file(tables: Sequence[Table]) -> str:
    """Return all tables as one file to ``\\input``."""
    return PREAMBLE + "\n" + "\n\n".join(map(as_latex, tables)) + "\n"


def escaped(text: str) -> str:
    """Return a text with LaTeX's own signs made harmless, on one line, each accent with its letter."""
    plain = unicodedata.normalize("NFC", " ".join(text.split()))
    safe = "".join(LATEX.get(sign, sign) for sign in plain if unicodedata.category(sign) != "Cc")
    return DASHES.sub("-{}", safe)


def _values(cell: Any, ranged: bool) -> tuple[Any, ...]:
    if isinstance(cell, Interval):
        return cell.value, cell.low, cell.high
    value = "" if cell is None else cell
    return (value, "", "") if ranged else (value,)


def _beside(table: Table) -> list[str]:
    """Return the lines of a table, the titles first; ranges stand beside their figures."""
    titles = [escaped(column.title) for column in table.columns]
    rows = [[" ".join(filter(None, _latex_cell(*cell))) for cell in _cells(table, row)] for row in table.rows]
    return list(map(_line, [titles, *rows]))


def _below(table: Table) -> list[str]:
    """Return the lines of a table, ranges below their figures, and long titles in two lines as well."""
    lines = ["\n".join(map(_line, zip(*(_halves(column.title) for column in table.columns), strict=True)))]
    for row in table.rows:
        figures, ranges = zip(*(_latex_cell(*cell) for cell in _cells(table, row)), strict=True)
        small = [one and rf"{{\footnotesize {one}}}" for one in ranges]
        lines.append(
            "\n".join([*map(_line, [figures, small] if any(ranges) else [figures]), r"\addlinespace"])
        )
    return lines


def _cells(table: Table, row: tuple[Any, ...]) -> Iterable[tuple[Column, Any]]:
    return zip(table.columns, row, strict=True)


def _line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _halves(title: str) -> tuple[str, str]:
    """Break a title at the space nearest to its middle; one word is the lower half."""
    spaces = [place for place, sign in enumerate(title) if sign == " "]
    if not spaces:
        return "", escaped(title)
    middle = min(spaces, key=lambda place: abs(2 * place - len(title)))
    return escaped(title[:middle]), escaped(title[middle:])


def _latex_cell(column: Column, value: Any) -> tuple[str, str]:
    """Return a figure and its range, which may be nothing."""
    between = spread(column.kind, value)
    low, _, high = map(escaped, between.partition(" to "))
    return escaped(written(column.kind, value)), f"[{low}, {high}]" if between else ""

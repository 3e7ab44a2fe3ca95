"""One self-contained HTML page: no network, light and dark, readable on a phone and on paper.

Every text that comes from data is escaped by Jinja; the page has no script at all. Plots are SVG with
a title and a description, and each has its figures in a table beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tunemill import __version__
from tunemill.evaluate.answers import FreeAnswers
from tunemill.evaluate.config import EvaluateConfig
from tunemill.evaluate.metrics import Classification, Confusion, Interval

if TYPE_CHECKING:
    from tunemill.evaluate.evaluate import Judged

TEXT_SHOWN = 280  # characters of an example text
LABEL_SHOWN = 26  # characters of a label beside the matrix, whose full name is in the table
MATRIX_MOST = 60  # labels; a larger matrix is unreadable, and its figures are in report.json
ERRORS_SHOWN = 20
NAMES = {"majority": "Majority class", "tfidf": "TF-IDF + logistic regression"}


@dataclass(frozen=True)
class Bar:
    """One line of the comparison plot; positions are percent of its width."""

    name: str
    figure: Interval
    macro_f1: Interval | None
    gain: Interval | None
    ours: bool


@dataclass(frozen=True)
class Cell:
    """One field of the confusion matrix."""

    row: int
    column: int
    count: int
    shade: float
    """Share of the row, 0 to 1."""
    title: str


@dataclass(frozen=True)
class Example:
    """A row that went wrong."""

    id: str
    text: str
    probability: float | None


def render(
    judged: Judged,
    provenance: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    config: EvaluateConfig,
) -> str:
    """Return the page."""
    figures = judged.figures
    return str(
        _template().render(
            judged=judged,
            figures=figures,
            labelled=isinstance(figures, Classification),
            headline=figures.accuracy if isinstance(figures, Classification) else figures.exact_match,
            bars=_bars(judged),
            cells=_cells(figures) if isinstance(figures, Classification) else [],
            matrix_most=MATRIX_MOST,
            confusions=_worst(judged, config),
            failed=_failed(judged),
            errors_shown=ERRORS_SHOWN,
            provenance=provenance,
            settings=settings,
            command=_command(provenance, config),
            version=__version__,
        )
    )


def _bars(judged: Judged) -> list[Bar]:
    figures = judged.figures
    if isinstance(figures, FreeAnswers):
        return [
            Bar("Exact match", figures.exact_match, None, None, True),
            Bar("Token F1", figures.token_f1, None, None, True),
        ]
    ours = Bar("These predictions", figures.accuracy, figures.macro_f1, None, True)
    others = [Bar(NAMES[one.name], one.accuracy, one.macro_f1, one.gain, False) for one in judged.baselines]
    return [ours, *others]


def _cells(figures: Classification) -> list[Cell]:
    names = [one.label for one in figures.per_class] + ["no answer"]
    cells = []
    for row, counts in enumerate(figures.matrix):
        total = sum(counts)
        for column, count in enumerate(counts):
            if count:
                title = f"{names[row]} → {names[column]}: {count} of {total}"
                cells.append(Cell(row, column, count, count / total, title))
    return cells


def _worst(judged: Judged, config: EvaluateConfig) -> list[tuple[Confusion, list[Example]]]:
    return [(one, _examples(judged, one, config.examples)) for one in judged.confusions[: config.confusions]]


def _examples(judged: Judged, confusion: Confusion, most: int) -> list[Example]:
    """Return the rows of a confusion that the model was surest of, in the data's order when unknown."""
    given = judged.predictions
    shares = given.probabilities
    rows = [
        row
        for row, pair in enumerate(zip(given.golds, given.answers, strict=True))
        if pair == (confusion.gold, confusion.predicted)
    ]
    if shares is not None:
        rows.sort(key=lambda row: -shares[row].max())
    return [
        Example(
            given.ids[row],
            _short(given.texts[row], TEXT_SHOWN),
            None if shares is None else float(shares[row].max()),
        )
        for row in rows[:most]
    ]


def _failed(judged: Judged) -> list[tuple[str, str]]:
    given = judged.predictions
    return [(identifier, error) for identifier, error in zip(given.ids, given.errors, strict=True) if error]


def _command(provenance: Sequence[Mapping[str, Any]], config: EvaluateConfig) -> str:
    """Return the command that makes this page again from the same artifacts."""
    by_role = {one["role"]: one["reference"] for one in provenance}
    run = by_role.get("predictions", "").partition("/")[0]
    inputs = [f"--input {role}={reference}" for role, reference in by_role.items()]
    defaults = EvaluateConfig().model_dump()
    changed = [f"--set {key}={value}" for key, value in config.model_dump().items() if value != defaults[key]]
    return " ".join([f"tunemill evaluate --run {run}", *inputs, *changed])


def _short(text: str, most: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


@lru_cache(maxsize=1)
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tunemill.evaluate", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["share"] = lambda value: f"{value:.3f}"
    environment.filters["percent"] = lambda value: f"{100 * value:.1f} %"
    environment.filters["signed"] = lambda value: f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")
    environment.filters["label"] = lambda text: _short(text, LABEL_SHOWN)
    return environment.get_template("report.html.jinja")

"""The learning curve: figures over the number of rows that were learned from, with their ranges.

Names are scikit-learn's (``learning_curve``): ``train_sizes``, and ``test_scores`` with a row for each size
and a column for each seed. A range is of the mean over the seeds, over bootstrap resamples of the test rows;
how far the seeds lie apart is the standard deviation beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tunemill.errors import BadDataError
from tunemill.evaluate import plots, sections
from tunemill.evaluate.bootstrap import Bootstrap, Measure
from tunemill.evaluate.config import EvaluateConfig
from tunemill.evaluate.figures import Interval
from tunemill.evaluate.page import Listing, Page, Picture, Section, Tile, Words
from tunemill.evaluate.paired import TITLES, measures
from tunemill.evaluate.predictions import Predictions
from tunemill.evaluate.report import origin, write_page
from tunemill.evaluate.tables import COUNT, REFERENCE, SHARE, Column, Table, spread, written
from tunemill.files import write_json

PLOTTED = 2  # figures drawn, the main one first
MARGIN = 0.12  # share of the width left of the first point, where the scale upwards is written
BASELINES = {"majority": "other", "tfidf": "wrong"}
"""Colours of their lines."""


@dataclass(frozen=True)
class Trained:
    """A model's predictions and what it has learned from."""

    size: int
    """Rows; 0 for the base model as it is."""
    seed: int | None
    """None for the base model."""
    predictions: Predictions
    provenance: dict[str, Any]
    """As in the report; its reference names the predictions."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """Facts of its report, where the baselines' figures are."""


@dataclass(frozen=True)
class Score:
    """One figure at one size."""

    name: str
    title: str
    test_scores: tuple[float, ...]
    """One for each seed, in the order of the trainings."""
    mean: Interval
    std: float | None
    """Standard deviation over the seeds, n - 1 in the denominator; None for one seed."""


@dataclass(frozen=True)
class Size:
    """All figures at one number of training rows."""

    train_size: int
    seeds: tuple[int, ...]
    """Empty for the base model."""
    scores: tuple[Score, ...]
    """The main figure first."""


@dataclass(frozen=True)
class Curve:
    """A learning curve."""

    rows: int
    """Test rows."""
    confidence: float
    sizes: tuple[Size, ...]
    """The smallest first."""
    baselines: Mapping[str, float]
    """The main figure of simple methods that learned from all rows, by their names."""


def learning_curve(trained: Sequence[Trained], groups: npt.NDArray[np.intp], config: EvaluateConfig) -> Curve:
    """Judge every training on the same rows. ``groups`` is as ``Bootstrap.clusters``.

    Raises:
        BadDataError: they answered different rows.
    """
    first = trained[0].predictions
    for other in trained[1:]:
        if (other.predictions.ids, other.predictions.golds) != (first.ids, first.golds):
            raise BadDataError(
                f"{other.provenance['reference']} answers other rows than "
                f"{trained[0].provenance['reference']}: a learning curve needs one test set"
            )
    bootstrap = Bootstrap(config.bootstrap_rounds, config.confidence, config.seed, groups)
    measured = [measures(one.predictions, bootstrap) for one in trained]
    names = [
        name for name in TITLES if all(name in one and not np.isnan(one[name].value) for one in measured)
    ]
    sizes = []
    for size in sorted({one.size for one in trained}):
        places = [place for place, one in enumerate(trained) if one.size == size]
        scores = tuple(_score(name, [measured[place][name] for place in places], bootstrap) for name in names)
        seeds = tuple(seed for place in places if (seed := trained[place].seed) is not None)
        sizes.append(Size(size, seeds, scores))
    known = {name: trained[-1].report.get(f"{name}_{names[0]}") for name in sections.NAMES}
    baselines = {name: float(value) for name, value in known.items() if value is not None}
    return Curve(len(first), config.confidence, tuple(sizes), baselines)


def _score(name: str, measured: Sequence[Measure], bootstrap: Bootstrap) -> Score:
    values = [one.value for one in measured]
    resampled = np.mean([one.resampled for one in measured], axis=0)
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Score(
        name, TITLES[name], tuple(values), bootstrap.interval(float(np.mean(values)), resampled), std
    )


def write_curve(
    output: Path, run: str, curve: Curve, trained: Sequence[Trained], command: str
) -> dict[str, Any]:
    """Write sweep.html, sweep.json, sweep.tex and CSV files; return what sweep.json holds."""
    record = as_record(curve, trained)
    write_page(output, "sweep", curve_page(run, curve, trained, command))
    write_json(output / "sweep.json", record)
    return record


def as_record(curve: Curve, trained: Sequence[Trained]) -> dict[str, Any]:
    """Return the curve as plain JSON values."""
    main = [size.scores[0] for size in curve.sizes]
    return {
        "score": main[0].name,
        "rows": curve.rows,
        "confidence": curve.confidence,
        "train_sizes": [size.train_size for size in curve.sizes],
        "test_scores": [list(score.test_scores) for score in main],
        "baselines": dict(curve.baselines),
        "sizes": [asdict(size) for size in curve.sizes],
        "trainings": [
            {"train_size": one.size, "seed": one.seed, "predictions": one.provenance["reference"]}
            for one in trained
        ],
    }


def curve_page(run: str, curve: Curve, trained: Sequence[Trained], command: str) -> Page:
    """Lay out the page."""
    last = curve.sizes[-1]
    main = last.scores[0]
    kind = sections.kind_of(main.name)
    seeds = max(len(size.seeds) for size in curve.sizes)
    return Page(
        subject=f"Tunemill learning curve · {run}",
        headline=written(kind, main.mean),
        what=f"{main.title.lower()} ({spread(kind, main.mean)}) from {last.train_size} rows",
        summary=f"{len(curve.sizes)} sizes, {seeds} seed{'s' if seeds > 1 else ''}, {curve.rows} test rows.",
        tiles=tuple(_tile(size, kind) for size in curve.sizes[:-1]),
        sections=(
            _curves(curve),
            _runs(curve, trained),
            origin([one.provenance for one in trained], {}, command),
        ),
    )


def _tile(size: Size, kind: str) -> Tile:
    from_rows = "Base model" if size.train_size == 0 else f"{size.train_size} rows"
    return Tile(from_rows, written(kind, size.scores[0].mean), spread(kind, size.scores[0].mean))


def _curves(curve: Curve) -> Section:
    shares = [n for n, score in enumerate(curve.sizes[0].scores) if score.name not in sections.LEVELS]
    across = _across([size.train_size for size in curve.sizes])
    pictures = []
    for number in shares[:PLOTTED]:
        line, name = _line(curve, number), curve.sizes[0].scores[number].name
        lines = [*(_level(curve, across) if number == 0 else []), line]
        drawn = plots.curve(f"curve-{name}", f"{line.name} by training rows", lines, across, plots.Axis())
        pictures.append(Picture(drawn, legend=tuple((each.colour, each.name) for each in reversed(lines))))
    told = Words(
        f"Across: training rows, on a logarithmic scale. Bands: {curve.confidence:.0%} ranges of the mean "
        "over the seeds, over resamples of the test rows. Faint dots: single seeds.",
        soft=True,
    )
    first, *others = curve.sizes[0].scores
    table = Table(
        "learning-curve",
        f"Means over the seeds with {curve.confidence:.0%} ranges; sd: standard deviation over the seeds.",
        (
            Column("train_size", "Training rows", COUNT),
            Column("seeds", "Seeds", COUNT),
            Column(first.name, first.title, sections.kind_of(first.name)),
            Column(f"{first.name}_std", "sd", SHARE),
            *(Column(score.name, score.title, sections.kind_of(score.name)) for score in others),
        ),
        tuple(_size_cells(size) for size in curve.sizes),
    )
    return Section("curve", "Learning curve", (*pictures, told, Listing(table)))


def _size_cells(size: Size) -> tuple[object, ...]:
    first, *others = size.scores
    return size.train_size, len(size.seeds), first.mean, first.std, *(score.mean for score in others)


def _line(curve: Curve, number: int) -> plots.Line:
    """Return the curve of one figure; the base model stands left of the smallest size."""
    left = _leftmost([size.train_size for size in curve.sizes])
    points, single = [], []
    for size in curve.sizes:
        score, place = size.scores[number], float(size.train_size or left)
        points.append(plots.Point(place, score.mean.value, score.mean.low, score.mean.high))
        if len(score.test_scores) > 1:
            single += [plots.Point(place, value, weight=0.05) for value in score.test_scores]
    return plots.Line(curve.sizes[0].scores[number].title, tuple(points), single=tuple(single))


def _level(curve: Curve, across: plots.Axis) -> list[plots.Line]:
    """Return a level line for each baseline."""
    return [
        plots.Line(
            f"{sections.NAMES[name]}, from all rows",
            tuple(plots.Point(place, value, weight=0) for place in (across.ticks[0], across.ticks[-1])),
            BASELINES[name],
        )
        for name, value in curve.baselines.items()
    ]


def _leftmost(sizes: Sequence[int]) -> float:
    """Return where the base model stands on a logarithmic scale: a third of the smallest size."""
    return max(min((size for size in sizes if size), default=1) / 3, 0.5)


def _across(sizes: Sequence[int]) -> plots.Axis:
    places = {(_leftmost(sizes) if size == 0 else float(size)): size for size in sizes}
    names = {
        place: "base" if size == 0 else f"{size:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
        for place, size in places.items()
    }
    low, high = min(places), max(places)
    left = low / max(high / low, 2) ** MARGIN
    return plots.Axis(left, high, tuple(sorted(places)), logarithmic=True, names=names)


def _runs(curve: Curve, trained: Sequence[Trained]) -> Section:
    scores = {
        (size.train_size, number): size.scores
        for size in curve.sizes
        for number in range(len(size.scores[0].test_scores))
    }
    counted: dict[int, int] = {}
    lines = []
    for one in trained:
        number = counted.setdefault(one.size, 0)
        counted[one.size] += 1
        values = tuple(score.test_scores[number] for score in scores[one.size, number])
        lines.append((one.size, one.seed, *values, one.provenance["reference"]))
    figures = [
        Column(score.name, score.title, sections.kind_of(score.name)) for score in curve.sizes[0].scores
    ]
    columns = (
        Column("train_size", "Training rows", COUNT),
        Column("seed", "Seed", COUNT),
        *figures,
        Column("predictions", "Predictions", REFERENCE),
    )
    told = Words("Rows are drawn by the seed; a larger size holds the rows of a smaller one.", soft=True)
    return Section(
        "trainings",
        "Each training",
        (told, Listing(Table("trainings", "One line for each.", columns, tuple(lines)))),
    )

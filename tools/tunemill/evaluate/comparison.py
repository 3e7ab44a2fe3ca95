"""Several models on the same rows, the first being what the others are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tunemill.evaluate import plots, sections
from tunemill.evaluate.baselines import Training
from tunemill.evaluate.bootstrap import Bootstrap
from tunemill.evaluate.config import EvaluateConfig
from tunemill.evaluate.evaluate import as_record, judge
from tunemill.evaluate.figures import Figure, FreeAnswers, Judged, Paired
from tunemill.evaluate.page import Listing, Page, Picture, Section, Tile, Words
from tunemill.evaluate.paired import holm, in_order, paired
from tunemill.evaluate.plots import Mark, Row
from tunemill.evaluate.predictions import Predictions
from tunemill.evaluate.report import origin, write_page
from tunemill.evaluate.tables import COUNT, NAME, NUMBER, POINTS, SHARE, Column, Table, spread, written
from tunemill.files import write_json
from tunemill.progress import Progress

SEVERAL_TESTS = (
    "Among many models some p-values are small by chance. Holm's p counts how many were compared; if one "
    "comparison was decided on beforehand, McNemar's own is its p."
)


@dataclass(frozen=True)
class Named:
    """One model's predictions."""

    name: str
    """For people, such as ``lora``."""
    predictions: Predictions
    provenance: dict[str, Any]
    """As in the report."""


@dataclass(frozen=True)
class Compared:
    """One model's figures."""

    name: str
    provenance: dict[str, Any]
    judged: Judged
    paired: Paired | None
    """This model minus the first; None for the first."""


def compare(
    models: Sequence[Named], groups: npt.NDArray[np.intp], config: EvaluateConfig, progress: Progress
) -> list[Compared]:
    """Judge all models and set each beside the first. ``groups`` has the clusters of the first's rows.

    Raises:
        BadDataError: they answered different rows or another task.
    """
    first = models[0].predictions
    bootstrap = Bootstrap(config.bootstrap_rounds, config.confidence, config.seed, groups)
    found = []
    for one in models:
        given = in_order(first, one.predictions)
        judged = judge(given, Training((), ()), groups, config, progress)
        pair = None if one is models[0] else paired(given, first, bootstrap)
        found.append(Compared(one.name, one.provenance, judged, pair))
    return found


def write_comparison(output: Path, models: Sequence[Compared], command: str) -> dict[str, Any]:
    """Write compare.html, compare.json, compare.tex and CSV files; return what compare.json holds."""
    score = models[0].judged.headlines[0].name
    adjusted = [None, *_holm(models)]
    described = [_record(*one) for one in zip(models, adjusted, strict=True)]
    record = {"score": score, "models": described, "command": command}
    write_page(output, "compare", comparison_page(models, command))
    write_json(output / "compare.json", record)
    return record


def _holm(models: Sequence[Compared]) -> list[float]:
    """Return Holm's p-value of each model but the first."""
    return holm([one.paired.p_value for one in models if one.paired])


def _record(one: Compared, holm_p_value: float | None) -> dict[str, Any]:
    return {
        "name": one.name,
        "predictions": one.provenance["reference"],
        "judged": as_record(one.judged),
        "minus_first": asdict(one.paired) | {"holm_p_value": holm_p_value} if one.paired else None,
    }


def comparison_page(models: Sequence[Compared], command: str) -> Page:
    """Lay out the page; the headline is the best model."""
    best = max(models, key=lambda one: one.judged.headlines[0].interval.value)
    main = best.judged.headlines[0]
    kind = sections.kind_of(main.name)
    return Page(
        subject=f"Tunemill comparison · {', '.join(one.name for one in models)}",
        headline=written(kind, main.interval),
        what=f"{main.title.lower()}, {spread(kind, main.interval)}: {best.name}",
        summary=f"{len(models)} models on the same {best.judged.figures.rows} rows.",
        tiles=tuple(_tile(one) for one in models if one is not best),
        sections=sections.present(
            _figures(models),
            _differences(models),
            _classes(models),
            origin([one.provenance for one in models], {}, command),
        ),
    )


def _tile(one: Compared) -> Tile:
    figure = one.judged.headlines[0]
    kind = sections.kind_of(figure.name)
    return Tile(one.name, written(kind, figure.interval), spread(kind, figure.interval))


def _figures(models: Sequence[Compared]) -> Section:
    main = models[0].judged.headlines[0]
    kind = sections.kind_of(main.name)
    bars = []
    for one in models:
        interval = one.judged.headlines[0].interval
        mark = Mark(interval.value, interval.low, interval.high, colour="ours" if one.paired else "other")
        bars.append(Row(one.name, (mark,), written(kind, interval)))
    common = _common(models)
    columns = (
        Column("model", "Model", NAME),
        *(Column(figure.name, figure.title, sections.kind_of(figure.name)) for figure in common),
        Column("errors", "Without answer", COUNT),
    )
    lines = tuple(
        (one.name, *(_interval(one, figure.name) for figure in common), one.judged.figures.errors)
        for one in models
    )
    told = f"Every model on the same rows, with {models[0].judged.confidence:.0%} ranges."
    picture = Picture(plots.rows("models-plot", f"{main.title} of each model", bars))
    remark = Words(models[0].judged.remarks[0], soft=True)
    return Section("models", "The models", (picture, Listing(Table("models", told, columns, lines)), remark))


def _differences(models: Sequence[Compared]) -> Section:
    first, others = models[0], [(one, one.paired) for one in models[1:] if one.paired]
    bars = []
    for one, pair in others:
        gain = pair.differences[0].interval
        mark = Mark(gain.value, gain.low, gain.high, "dot")
        bars.append(Row(f"{one.name} minus {first.name}", (mark,), f"{written(POINTS, gain)} points"))
    ends = [end for row in bars for mark in row.marks for end in (mark.low or 0, mark.high or 0)]
    title = f"Difference in {first.judged.headlines[0].title.lower()}"
    picture = Picture(plots.rows("differences-plot", title, bars, plots.around_zero(ends)))
    shown = [figure for figure in _common(models) if all(_gain(pair, figure.name) for _, pair in others)]
    several = (Column("holm_p_value", "Holm's p", NUMBER),) if len(others) > 1 else ()
    columns = (
        Column("model", "Model", NAME),
        *(Column(figure.name, figure.title, _kind_of_gain(figure.name)) for figure in shown),
        Column("only_first", "Only it right", COUNT),
        Column("only_second", f"Only {first.name} right", COUNT),
        Column("p_value", "McNemar's p", NUMBER),
        *several,
    )
    lines = tuple(
        (
            one.name,
            *(_gain(pair, figure.name) for figure in shown),
            pair.only_first,
            pair.only_second,
            pair.p_value,
            *([adjusted] if several else []),
        )
        for (one, pair), adjusted in zip(others, _holm(models), strict=True)
    )
    told = f"Each model minus {first.name}, in points where the figure is a share."
    blocks = (picture, Listing(Table("differences", told, columns, lines)))
    said = (
        Words(sections.MCNEMAR, soft=True),
        *([Words(SEVERAL_TESTS, soft=True)] if several else []),
    )
    return Section("differences", f"Beside {first.name}", (*blocks, *said))


def _classes(models: Sequence[Compared]) -> Section | None:
    """Set the models' F1 of each label side by side."""
    figures = [one.judged.figures for one in models]
    judged = [one for one in figures if not isinstance(one, FreeAnswers)]
    if len(judged) < len(models):
        return None
    columns = (
        Column("label", "Label", NAME),
        Column("support", "Rows", COUNT),
        *(Column(f"f1_{number}", one.name, SHARE) for number, one in enumerate(models, 1)),
    )
    lines = tuple(
        (same[0].label, same[0].support, *(each.f1 for each in same))
        for same in zip(*(one.per_class for one in judged), strict=True)
    )
    return Section("classes", "Each label", (Listing(Table("f1", "F1 of each label.", columns, lines)),))


def _common(models: Sequence[Compared]) -> list[Figure]:
    """Return the headline figures that all models have, as the first has them."""
    names = [{figure.name for figure in one.judged.headlines} for one in models]
    return [figure for figure in models[0].judged.headlines if all(figure.name in each for each in names)]


def _interval(one: Compared, name: str) -> Any:
    return next(figure.interval for figure in one.judged.headlines if figure.name == name)


def _gain(pair: Paired, name: str) -> Any:
    return next((figure.interval for figure in pair.differences if figure.name == name), None)


def _kind_of_gain(name: str) -> str:
    return SHARE if name in sections.LEVELS else POINTS

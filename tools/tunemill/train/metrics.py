"""What training measured along the way, as a table and a plot in the artifact."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tunemill.files import atomic_write, write_text

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "eval_loss",
    "learning_rate",
    "grad_norm",
    "eval_mean_token_accuracy",
)
Row = Mapping[str, Any]


def write_metrics(directory: Path, rows: Sequence[Row]) -> None:
    """Write ``metrics.csv``, a row for each step and evaluation, and ``metrics.svg``."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(directory / "metrics.csv", text.getvalue())
    _plot(directory / "metrics.svg", rows)


def thin(points: Sequence[tuple[float, float]], most: int = 500) -> list[tuple[float, float]]:
    """Return at most ``most`` points, each the mean of as many neighbours."""
    width = -(-len(points) // most) or 1
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def _plot(path: Path, rows: Sequence[Row]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "tunemill", "svg.fonttype": "none"}):  # equal rows, equal bytes
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for name, label in (("loss", "training loss"), ("eval_loss", "validation loss")):
            points = thin([(row["step"], row[name]) for row in rows if name in row])
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else "")
        axes.set_xlabel("step")
        axes.set_ylabel("loss per completion token (nats)")
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend()
        with atomic_write(path) as target:
            figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})

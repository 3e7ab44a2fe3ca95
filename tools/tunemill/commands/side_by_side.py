"""``tunemill quantize --types``: several quantizations, compared, and the best that fits into the memory.

Each is made by the ordinary stage, so it is the same artifact as when it is made alone. Divergence and
labels are those of the stage's own parity check; speed is measured here and now.
"""

from __future__ import annotations

import json
import re
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from tunemill.commands.pipeline import aligned, split_quants
from tunemill.errors import BadDataError, UsageError
from tunemill.gguf.footprint import Footprint, footprint, trained_context
from tunemill.gguf.parts import read_model
from tunemill.ggufs import find_gguf
from tunemill.progress import Progress
from tunemill.recipe import Recipe, Setting
from tunemill.signals import Signals
from tunemill.stage import Plan, check, execute, plan
from tunemill.store import Artifact, Store
from tunemill.work import Stage

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
USUAL_CONTEXT = 4096  # tokens; more than a prompt and its answer take in most tasks
TITLES = ("type", "size", "needs", "mean KL", "worst KL", "top-1", "labels agree", "read/s", "write/s")


@dataclass(frozen=True)
class Wanted:
    """What was asked for on the command line."""

    types: tuple[str, ...]
    budget: int | None
    """Bytes of memory."""
    context: int | None
    """Tokens."""


@dataclass(frozen=True)
class Made:
    """One quantization and what is known of it."""

    type: str
    artifact: Artifact
    footprint: Footprint
    context: int
    parity: dict[str, Any]
    """Of the artifact's facts; with figures where there was a probe set."""
    speed: dict[str, float]
    """Tokens a second, of a prompt read and of an answer written."""

    def record(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        memory = {**asdict(self.footprint), "total": self.footprint.total, "context": self.context}
        return {
            "type": self.type,
            "reference": self.artifact.reference,
            "bytes": self.artifact.facts["bytes"],
            "memory": memory,
            "parity": self.parity,
            "tokens_per_second": self.speed,
        }


def parse(types: str, budget: str | None, context: int | None) -> Wanted:
    """Read the options.

    Raises:
        UsageError: no type is named, or the memory is no amount.
    """
    return Wanted(tuple(split_quants([types])), parse_memory(budget) if budget else None, context)


def parse_memory(text: str) -> int:
    """Return the bytes of an amount such as ``6GB`` or ``8GiB``.

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip().upper())
    if not found:
        raise UsageError(f"--memory-budget {text}: expected an amount such as 6GB or 8GiB")
    return int(float(found[1]) * UNITS[found[2] or ""])


def plan_all(
    store: Store, stage: Stage[Any], recipe: Recipe, chosen: Mapping[str, str], wanted: Wanted
) -> list[Plan]:
    """Return the plan of each type, all of them checked before the first is made.

    Raises:
        UsageError: a type is unknown, or an input is missing.
    """
    plans = [plan(store, stage, _with_type(recipe, name), chosen) for name in wanted.types]
    for planned in plans:
        check(planned)
    return plans


def run(store: Store, plans: Sequence[Plan], wanted: Wanted, as_json: bool, signals: Signals) -> None:
    """Make all types, print them side by side, and name the best that fits.

    Raises:
        BadDataError: a type could not be made or lost its parity; the others were made and shown.
    """
    progress = Progress()
    made: list[Made] = []
    failed: list[str] = []
    for name, planned in zip(wanted.types, plans, strict=True):
        try:
            made.append(_make(store, planned, name, wanted, progress, signals))
        except BadDataError as error:
            failed.append(f"{name} was not made: {error}")
        signals.raise_if_received()
    best = recommend(made, wanted.budget)
    if as_json:
        click.echo(json.dumps(_record(made, failed, wanted, best)))
    elif made:
        click.echo("\n".join([table(made), *_advice(made, wanted, best)]))
    if failed:
        raise BadDataError("; ".join(failed))


def recommend(made: Sequence[Made], budget: int | None) -> Made | None:
    """Return what diverges least of those that fit; the largest where divergences are not known."""
    fitting = [each for each in made if budget is not None and each.footprint.total <= budget]
    if all("mean_kl" in each.parity for each in fitting):
        return min(fitting, key=lambda each: (each.parity["mean_kl"], each.footprint.total), default=None)
    return max(fitting, key=lambda each: each.footprint.total, default=None)


def table(made: Sequence[Made]) -> str:
    """Return a row for each type under a row of titles."""
    return aligned([TITLES, *map(_row, made)])


def _row(made: Made) -> tuple[str, ...]:
    parity = made.parity
    figures = [f"{parity[key]:.2g}" if key in parity else "-" for key in ("mean_kl", "worst_kl")]
    figures.append(f"{parity['top1']:.4f}" if "top1" in parity else "-")
    agree = f"{1 - parity['flips'] / parity['probes']:.3f}" if "flips" in parity else "-"
    speeds = [f"{made.speed[key]:.4g}" for key in ("prompt", "written")]
    sizes = [shown(made.artifact.facts["bytes"]), shown(made.footprint.total)]
    return (made.type, *sizes, *figures, agree, *speeds)


def _advice(made: Sequence[Made], wanted: Wanted, best: Made | None) -> list[str]:
    if wanted.budget is None:
        return []
    parts = made[0].footprint
    how = (
        f"needs: weights, {shown(parts.cache)} of keys and values for {made[0].context} tokens in F16, "
        f"{shown(parts.computing)} to compute a batch of 512 tokens"
    )
    if best is None:
        least = min(made, key=lambda each: each.footprint.total)
        fits = f"none fits into {shown(wanted.budget)}: the smallest, {least.type}, needs"
        return [how, f"{fits} {shown(least.footprint.total)}"]
    why = "diverges least" if "mean_kl" in best.parity else "is the largest"
    return [how, f"recommended for {shown(wanted.budget)}: {best.type}, which {why} of those that fit"]


def shown(count: int) -> str:
    """Return bytes for people, in steps of a thousand."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1000:.1f} kB"


def _make(
    store: Store, planned: Plan, name: str, wanted: Wanted, progress: Progress, signals: Signals
) -> Made:
    from tunemill.gguf.library import Library

    artifact = execute(store, planned, progress, signals).artifact
    with tempfile.TemporaryDirectory(prefix="tunemill-") as scratch:
        folder = Path(scratch, "model")
        store.pull(artifact, folder, Progress(quiet=True))
        path = find_gguf(folder)
        header = read_model(path)
        trained = trained_context(header)
        context = wanted.context or min(trained or USUAL_CONTEXT, USUAL_CONTEXT)
        speed = Library(Path(scratch), threading.Event()).speed(path).value
    parity = dict(artifact.facts.get("parity", {}))
    return Made(name, artifact, footprint(header, context), context, parity, speed)


def _with_type(recipe: Recipe, name: str) -> Recipe:
    return replace(recipe, settings={**recipe.settings, "quant": Setting(name, "flag")})


def _record(made: Sequence[Made], failed: Sequence[str], wanted: Wanted, best: Made | None) -> dict[str, Any]:
    return {
        "types": [each.record() for each in made],
        "failed": list(failed),
        "memory_budget": wanted.budget,
        "recommended": best.type if best else None,
    }

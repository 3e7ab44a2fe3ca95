"""``tunemill pipeline``: every stage in order, in one process, and a table of what came of them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from tunemill import options
from tunemill.errors import UsageError
from tunemill.progress import Progress
from tunemill.recipe import Choice, Recipe, Setting, resolve
from tunemill.signals import Signals
from tunemill.stage import Outcome, Plan, check, execute, plan
from tunemill.stages import known_keys, load_stage
from tunemill.store import Artifact, Store

BEFORE_QUANTIZATION = ("fetch", "prepare", "train", "merge", "convert")
REPORTS = Path(".tunemill/reports")
# Facts of a report that belong on the terminal, with their titles; the baselines stand beside the result.
FIGURES = {
    "accuracy": "accuracy",
    "accuracy_low": "from",
    "accuracy_high": "to",
    "exact_match": "exact match",
    "any_overlap": "any overlap",
    "token_f1": "token F1",
    "numeracy_f1": "numeracy F1",
    "macro_f1": "macro-F1",
    "mean_absolute_error": "mean difference",
    "majority_accuracy": "majority class",
    "majority_exact_match": "majority set",
    "tfidf_accuracy": "TF-IDF",
    "tfidf_exact_match": "TF-IDF",
    "rows": "rows",
    "errors": "errors",
}

log = logging.getLogger("tunemill")


@dataclass(frozen=True)
class Step:
    """One stage of the pipeline with its own recipe."""

    stage: str
    recipe: Recipe
    quant: str | None
    """The quantization it belongs to; None for the stages that all share."""


@click.command(
    epilog="\b\nExamples:\n  tunemill pipeline --model tiny --task stdlib\n"
    "  tunemill pipeline --model tiny --task stdlib --quant F16,Q4_K_M"
)
@options.recipe
@click.option(
    "--quant",
    "quants",
    metavar="TYPES",
    multiple=True,
    default=("Q4_K_M",),
    show_default="Q4_K_M",
    help="Quantizations to make and judge, with commas or repeated; F16 is the unquantized GGUF.",
)
@options.store
@options.publish_anyway
@options.dry_run
@options.json
@click.pass_obj
def pipeline(
    signals: Signals,
    /,
    quants: Sequence[str],
    store_url: str,
    dry_run: bool,
    as_json: bool,
    recipe_file: str | None,
    **choice: Any,
) -> None:
    """Run all stages in order, reusing what exists."""
    recipe = resolve(Choice(file=recipe_file, **choice), known_keys())
    steps = list(lay_out(recipe, split_quants(quants)))
    for step in steps:
        step.recipe.configure(load_stage(step.stage))  # what is wrong with the last stage is said now
    store = options.open_the_store(store_url)
    if dry_run:
        _foretell(store, steps, as_json)
        return
    outcomes = _run(store, steps, signals)
    reports = [
        (step, _keep_report(store, outcome.artifact))
        for step, outcome in zip(steps, outcomes, strict=True)
        if step.stage == "evaluate"
    ]
    if as_json:
        click.echo(json.dumps(_record(outcomes, [str(path) for _, path in reports])))
        return
    click.echo(table(steps, outcomes))
    for step, path in reports:
        click.echo(f"report {step.quant}: {path}")
    click.echo(outcomes[-1].artifact.reference)


def split_quants(given: Sequence[str]) -> list[str]:
    """Return each type once, in the order given; words may hold several, with commas.

    Raises:
        UsageError: there is none.
    """
    types = [part.strip() for word in given for part in word.split(",")]
    quants = list(dict.fromkeys(part.upper() for part in types if part))
    if not quants:
        raise UsageError("--quant names no quantization: for example --quant F16,Q4_K_M")
    return quants


def lay_out(recipe: Recipe, quants: Sequence[str]) -> Iterator[Step]:
    """Yield the steps: what all quantizations share, then the rest for each of them."""
    for stage in BEFORE_QUANTIZATION:
        yield Step(stage, recipe, None)
    if "imatrix" in recipe.settings and recipe.settings["imatrix"].value is True:
        yield Step("imatrix", recipe, None)
    converted = str(recipe.settings["outtype"].value if "outtype" in recipe.settings else "f16").upper()
    for quant in quants:
        own = replace(recipe, settings={**recipe.settings, "quant": Setting(quant, "flag")})
        stages = ("infer", "evaluate") if quant == converted else ("quantize", "infer", "evaluate")
        for stage in stages:
            yield Step(stage, own, quant)


def _run(store: Store, steps: Sequence[Step], signals: Signals) -> list[Outcome]:
    outcomes: list[Outcome] = []
    checked = False
    progress = Progress()
    for number, step in enumerate(steps):
        planned = plan(store, load_stage(step.stage), step.recipe, {})
        if planned.existing is None and not checked:
            _check_all(store, steps[number:])
            checked = True
        outcomes.append(execute(store, planned, progress, signals))
        signals.raise_if_received()
    return outcomes


def _check_all(store: Store, steps: Sequence[Step]) -> None:
    """Let every stage that may run check its configuration before the first one costs time."""
    for step in steps:
        check(plan(store, load_stage(step.stage), step.recipe, {}))


def _foretell(store: Store, steps: Sequence[Step], as_json: bool) -> None:
    plans = [plan(store, load_stage(step.stage), step.recipe, {}) for step in steps]
    if as_json:
        click.echo(json.dumps({"stages": [_foretold(planned) for planned in plans]}))
        return
    rows = [(entry["stage"], entry["would"], entry["output"]) for entry in map(_foretold, plans)]
    click.echo(aligned(rows))


def _foretold(planned: Plan) -> dict[str, str]:
    output = planned.existing.reference if planned.existing else planned.output
    would = "reuse" if planned.existing else "run"
    return {"stage": planned.stage.name, "would": would, "output": output}


def _keep_report(store: Store, report: Artifact) -> Path:
    """Put a report where a person finds it, replacing an older one of the same name."""
    run, _, kind = report.name.partition("/")
    folder = REPORTS / f"{run}-{kind.removeprefix('report-')}"
    if folder.exists():
        shutil.rmtree(folder)
    store.pull(report, folder, Progress(quiet=True))
    page = folder / "report.html"
    return page if page.exists() else folder


def table(steps: Sequence[Step], outcomes: Sequence[Outcome]) -> str:
    """Return stages, seconds and references, then the figures of each report."""
    rows = [("stage", "seconds", "", "output")]
    for outcome in outcomes:
        done = "reused" if outcome.reused else "ran"
        rows.append((outcome.plan.stage.name, f"{outcome.seconds:.1f}", done, outcome.artifact.reference))
    rows.append(("all", f"{sum(outcome.seconds for outcome in outcomes):.1f}", "", ""))
    facts = {
        step.quant or "": outcome.artifact.facts
        for step, outcome in zip(steps, outcomes, strict=True)
        if step.stage == "evaluate"
    }
    return f"{aligned(rows)}\n\n{aligned(figures(facts))}"


def figures(facts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return a row for each quantization with the headline figures of its report, after a title row."""
    shown = [key for key in FIGURES if any(key in found for found in facts.values())]
    rows = [("", *(FIGURES[key] for key in shown))]
    rows += [(quant, *(_figure(found.get(key)) for key in shown)) for quant, found in facts.items()]
    return rows


def _figure(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text with columns of equal width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def _record(outcomes: Sequence[Outcome], reports: Sequence[str]) -> dict[str, Any]:
    return {"stages": [outcome.record() for outcome in outcomes], "reports": list(reports)}

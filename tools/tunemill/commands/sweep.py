"""``tunemill sweep``: the same task learned from more and more rows, and the learning curve of it.

Each point is a run of its own, made by the ordinary stages from the run's data: what exists is reused, and
a sweep that was killed goes on. The point of all rows with the recipe's seed is the run itself.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from tunemill import options
from tunemill.commands.judging import read_answers, read_groups
from tunemill.commands.pipeline import REPORTS, Step, aligned, lay_out, split_quants
from tunemill.errors import UsageError
from tunemill.progress import Progress
from tunemill.recipe import Choice, Recipe, Setting, resolve
from tunemill.signals import Signals
from tunemill.stage import Plan, check, execute, plan
from tunemill.stages import known_keys, load_stage
from tunemill.store import Artifact, Store

SHARED = ("fetch", "prepare")
LEARNING = ("train", "merge")
ALL = "all"
BASE = 0
"""The size of the base model, which has learned from no row."""

log = logging.getLogger("tunemill")


@dataclass(frozen=True)
class Point:
    """One training of the sweep."""

    size: int | None
    """Rows of the train split; None for all, ``BASE`` for the base model."""
    seed: int | None
    """None for the base model."""
    recipe: Recipe

    @property
    def title(self) -> str:
        """Return it for people."""
        rows = {None: "all rows", BASE: "the base model"}.get(self.size, f"{self.size} rows")
        return rows if self.seed is None else f"{rows}, seed {self.seed}"


@dataclass(frozen=True)
class Made:
    """What came of a point."""

    size: int
    """Rows that it has learned from."""
    point: Point
    predictions: Artifact
    report: Artifact


@click.command(
    epilog="\b\nExamples:\n  tunemill sweep --model tiny --task stdlib --train-sizes 0,500,2000,all\n"
    "  tunemill sweep --model llama3 --task cap --train-sizes 100,1000,all --seeds 1,2,3"
)
@options.recipe
@click.option(
    "--train-sizes",
    metavar="SIZES",
    required=True,
    help="Rows to train on, with commas; 0 is the base model as it is, all the whole train split.",
)
@click.option(
    "--seeds",
    metavar="SEEDS",
    help="Seeds that draw the rows and train, with commas.  [default: the recipe's]",
)
@click.option(
    "--quant", metavar="TYPE", default="Q4_K_M", show_default=True, help="Quantization to make and judge."
)
@click.option(
    "--output",
    metavar="DIRECTORY",
    type=click.Path(path_type=Path),
    help="Where the page goes.  [default: .tunemill/reports/RUN-sweep-TYPE]",
)
@options.store
@options.dry_run
@options.json
@click.pass_obj
def sweep(
    signals: Signals,
    /,
    train_sizes: str,
    seeds: str | None,
    quant: str,
    output: Path | None,
    store_url: str,
    dry_run: bool,
    as_json: bool,
    recipe_file: str | None,
    **choice: Any,
) -> None:
    """Train on more and more rows, and plot the learning curve.

    Rows are drawn by the seed, so that a larger size holds the rows of a smaller one. Every point is a run
    named RUN-SIZE-SEED with artifacts of its own; what exists is reused. Prints the page's path.
    """
    chosen = Choice(file=recipe_file, **choice)
    recipe = resolve(chosen, known_keys())
    wanted, drawn = one_type(quant), parse_seeds(seeds, recipe)
    points = lay_points(recipe, parse_sizes(train_sizes), drawn)
    for step in lay_out(recipe, [wanted]):
        step.recipe.configure(load_stage(step.stage))
    store = options.open_the_store(store_url)
    if dry_run:
        _foretell(store, recipe, points, wanted, as_json)
        return
    trained = _run(store, recipe, points, wanted, signals)
    folder = output or REPORTS / f"{recipe.names['run']}-sweep-{wanted.lower()}"
    words = ["--train-sizes", train_sizes, "--seeds", ",".join(map(str, drawn)), "--quant", wanted]
    command = shlex.join(["tunemill", "sweep", *chosen.words(), *words])
    record = _write(store, recipe, trained, command, folder)
    if as_json:
        click.echo(json.dumps({**record, "page": str(folder / "sweep.html")}))
        return
    click.echo(table(record))
    click.echo(str(folder / "sweep.html"))


def one_type(quant: str) -> str:
    """Return the one quantization that is named.

    Raises:
        UsageError: there are several, or none.
    """
    types = split_quants([quant])
    if len(types) > 1:
        raise UsageError(f"--quant {quant}: a learning curve is of one type, so that only the rows differ")
    return types[0]


def parse_sizes(given: str) -> list[int | None]:
    """Return the sizes, the smallest first, each once; None is all rows.

    Raises:
        UsageError: one is no number of rows.
    """
    sizes: set[int | None] = set()
    for word in _words(given, "--train-sizes"):
        if word != ALL and not word.isdecimal():
            raise UsageError(f"--train-sizes {given}: '{word}' is neither a number of rows nor all")
        sizes.add(None if word == ALL else int(word))
    return sorted(sizes, key=lambda size: (size is None, size or 0))


def parse_seeds(given: str | None, recipe: Recipe) -> list[int]:
    """Return the seeds in their order, each once; the recipe's when none are given.

    Raises:
        UsageError: one is no seed.
    """
    if given is None:
        return [own_seed(recipe)]
    words = _words(given, "--seeds")
    if wrong := [word for word in words if not word.isdecimal()]:
        raise UsageError(f"--seeds {given}: '{wrong[0]}' is no whole number from 0 on")
    return list(dict.fromkeys(map(int, words)))


def _words(given: str, option: str) -> list[str]:
    """Return what stands between the commas.

    Raises:
        UsageError: nothing does.
    """
    words = [word.strip() for word in given.split(",") if word.strip()]
    if not words:
        raise UsageError(f"{option} names nothing: for example {option} 1,2,3")
    return words


def own_seed(recipe: Recipe) -> int:
    """Return the seed that a run of the recipe trains with."""
    seed: int = recipe.configure(load_stage("train")).seed
    return seed


def lay_points(recipe: Recipe, sizes: Sequence[int | None], seeds: Sequence[int]) -> list[Point]:
    """Return a point for each size and seed, with the recipe of its run.

    Raises:
        UsageError: the recipe has no run, or sets what a sweep varies.
    """
    if "run" not in recipe.names:
        raise UsageError("a sweep needs --run, or --model and --task")
    if "max_train_samples" in recipe.settings:
        raise UsageError("max_train_samples is what a sweep varies: give --train-sizes instead")
    points = [
        Point(size, seed, _recipe_of(recipe, size, seed)) for size in sizes if size != BASE for seed in seeds
    ]
    base = [Point(BASE, None, _named(recipe, "base"))] if BASE in sizes else []
    return [*base, *points]


def _recipe_of(recipe: Recipe, size: int | None, seed: int) -> Recipe:
    if size is None and seed == own_seed(recipe):
        return recipe
    return _named(recipe, f"{size or ALL}-{seed}")


def _named(recipe: Recipe, ending: str) -> Recipe:
    return replace(recipe, names={**recipe.names, "run": f"{recipe.names['run']}-{ending}"})


def steps_of(point: Point, quant: str) -> Iterator[Step]:
    """Yield the stages of a point; only training is told the size and the seed."""
    for step in lay_out(point.recipe, [quant]):
        if step.stage in SHARED or (point.size == BASE and step.stage in LEARNING):
            continue
        if step.stage == "train":
            varied = {"seed": point.seed, **({} if point.size is None else {"max_train_samples": point.size})}
            settings = {key: Setting(value, "flag") for key, value in varied.items()}
            step = replace(step, recipe=replace(step.recipe, settings={**step.recipe.settings, **settings}))
        yield step


def _plan(store: Store, step: Step, given: Mapping[str, str]) -> Plan:
    stage = load_stage(step.stage)
    takes = stage.templates(step.recipe.configure(stage))
    return plan(store, stage, step.recipe, {role: given[role] for role in takes if role in given})


def _given(point: Point, base: Artifact, data: Artifact) -> dict[str, str]:
    """Return what a point takes from the run: its data, and for the base model what is converted."""
    given = {"data": data.reference}
    return given | ({"merged": base.reference} if point.size == BASE else {})


def _run(store: Store, recipe: Recipe, points: Sequence[Point], quant: str, signals: Signals) -> list[Made]:
    """Make every point."""
    progress = Progress()
    made = {}
    for name in SHARED:
        made[name] = execute(store, plan(store, load_stage(name), recipe, {}), progress, signals).artifact
        signals.raise_if_received()
    base, data = made["fetch"], made["prepare"]
    there = _train_rows(data, points)
    for point in points:
        for step in steps_of(point, quant):
            check(_plan(store, step, _given(point, base, data)))  # what would fail late is said now
    found = []
    for number, point in enumerate(points, 1):
        log.info("sweep: %d of %d, %s", number, len(points), point.title)
        for step in steps_of(point, quant):
            planned = _plan(store, step, _given(point, base, data))
            made[step.stage] = execute(store, planned, progress, signals).artifact
            signals.raise_if_received()
        size = there if point.size is None else point.size
        found.append(Made(size, point, made["infer"], made["evaluate"]))
    return found


def _train_rows(data: Artifact, points: Sequence[Point]) -> int:
    """Return how many rows the train split has.

    Raises:
        UsageError: a point wants as many or more by their number.
    """
    there = int(data.facts["rows"]["train"])
    most = max((point.size or 0 for point in points), default=0)
    if most >= there:
        raise UsageError(f"--train-sizes: the train split has {there} rows, so say {ALL} instead of {most}")
    return there


def _foretell(store: Store, recipe: Recipe, points: Sequence[Point], quant: str, as_json: bool) -> None:
    shared = {name: plan(store, load_stage(name), recipe, {}).existing for name in SHARED}
    base, data = shared["fetch"], shared["prepare"]
    told = [{"point": "shared", "stage": name, "would": _would(shared[name])} for name in SHARED]
    for point in points:
        given = _given(point, base, data) if base and data else {}
        for step in steps_of(point, quant):
            existing = _plan(store, step, given).existing if given else None
            told.append({"point": point.title, "stage": step.stage, "would": _would(existing)})
    if as_json:
        click.echo(json.dumps({"stages": told}))
        return
    click.echo(aligned([(each["point"], each["stage"], each["would"]) for each in told]))


def _would(existing: Artifact | None) -> str:
    return "reuse" if existing else "run"


def _write(
    store: Store,
    recipe: Recipe,
    made: Sequence[Made],
    command: str,
    folder: Path,
) -> dict[str, Any]:
    """Judge the points, write the page and its tables, and return what ``sweep.json`` holds."""
    from tunemill.evaluate.learning import Trained, learning_curve, write_curve

    answers = [read_answers(store, each.predictions) for each in made]
    groups = read_groups(store, answers[0])
    trained = [
        Trained(one.size, one.point.seed, each.predictions, each.provenance, one.report.facts)
        for one, each in zip(made, answers, strict=True)
    ]
    curve = learning_curve(trained, groups, recipe.configure(load_stage("evaluate")))
    return write_curve(folder, recipe.names["run"], curve, trained, command)


def table(record: Mapping[str, Any]) -> str:
    """Return a line for each size: rows, seeds, the main figure with its range and spread over seeds."""
    rows: list[tuple[str, ...]] = [("rows", "seeds", record["score"], "from", "to", "sd")]
    for size in record["sizes"]:
        score = size["scores"][0]
        figures = [score["mean"][key] for key in ("value", "low", "high")] + [score["std"]]
        shown = ("-" if value is None else f"{value:.3f}" for value in figures)
        rows.append((str(size["train_size"]), str(len(size["seeds"])), *shown))
    return aligned(rows)

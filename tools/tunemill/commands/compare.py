"""``tunemill compare``: several models on the same rows, side by side and in pairs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from tunemill import options
from tunemill.commands.judging import find_answers, read_answers, read_groups
from tunemill.commands.pipeline import REPORTS, aligned
from tunemill.errors import UsageError
from tunemill.progress import Progress
from tunemill.recipe import Choice, resolve
from tunemill.signals import Signals
from tunemill.stages import known_keys, load_stage


@click.command(
    epilog="\b\nExamples:\n  tunemill compare tiny-stdlib/predictions-f16 tiny-stdlib/predictions-q4_k_m\n"
    "  tunemill compare base=tiny-stdlib-base/predictions-f16 lora=tiny-stdlib/predictions-f16"
)
@click.argument("references", metavar="[NAME=]REF...", nargs=-1, required=True)
@options.settings
@click.option(
    "--output",
    metavar="DIRECTORY",
    type=click.Path(path_type=Path),
    help="Where the page goes.  [default: .tunemill/reports/compare]",
)
@options.store
@options.json
@click.pass_obj
def compare(
    signals: Signals,
    /,
    references: Sequence[str],
    settings: Sequence[str],
    output: Path | None,
    store_url: str,
    as_json: bool,
) -> None:
    """Set models side by side on the same rows.

    REF names predictions, or a report of them; the first is what the others are compared with. Differences
    are given with their ranges and McNemar's test. Keys to set are those of evaluate. Prints the page's path.
    """
    named = parse_models(references)
    config = resolve(Choice(settings=settings), known_keys()).configure(load_stage("evaluate"))
    store = options.open_the_store(store_url)
    artifacts = {name: find_answers(store, reference) for name, reference in named.items()}
    from tunemill.evaluate.comparison import Named, write_comparison
    from tunemill.evaluate.comparison import compare as compare_models

    answers = {name: read_answers(store, artifact) for name, artifact in artifacts.items()}
    signals.raise_if_received()
    groups = read_groups(store, next(iter(answers.values())))
    models = [Named(name, each.predictions, each.provenance) for name, each in answers.items()]
    compared = compare_models(models, groups, config, Progress(quiet=True))
    words = [f"{name}={artifact.reference}" for name, artifact in artifacts.items()]
    command = shlex.join(["tunemill", "compare", *words, *Choice(settings=settings).words()])
    folder = output or REPORTS / "compare"
    record = write_comparison(folder, compared, command)
    if as_json:
        click.echo(json.dumps({**record, "page": str(folder / "compare.html")}))
        return
    click.echo(table(record))
    click.echo(str(folder / "compare.html"))


def parse_models(references: Sequence[str]) -> dict[str, str]:
    """Return references by the names they are shown under: those given, else the references.

    Raises:
        UsageError: there are fewer than two, or two of one name.
    """
    named: dict[str, str] = {}
    for word in references:
        name, equals, reference = word.partition("=")
        shown = name if equals else word.partition("@")[0]
        if not shown or (equals and not reference):
            raise UsageError(f"'{word}' is no [NAME=]REF")
        if shown in named:
            raise UsageError(f"two models are called {shown}: give them names, as in base={word} lora=…")
        named[shown] = reference if equals else word
    if len(named) < 2:
        raise UsageError(
            "compare takes two predictions or more: the first is what the others are compared with"
        )
    return named


def table(record: Mapping[str, Any]) -> str:
    """Return a line for each model: the main figure with its range, and what it is ahead of the first by."""
    rows = [("model", record["score"], "from", "to", "ahead by", "from", "to", "p")]
    for model in record["models"]:
        own, pair = _ends(model["judged"]["headlines"][record["score"]]), model["minus_first"]
        gain = _ends(pair["differences"][0]["interval"]) if pair else ("-", "-", "-")
        rows.append((model["name"], *own, *gain, f"{pair['p_value']:.2g}" if pair else "-"))
    return aligned(rows)


def _ends(interval: Mapping[str, float]) -> tuple[str, str, str]:
    value, low, high = (f"{interval[key]:.3f}" for key in ("value", "low", "high"))
    return value, low, high

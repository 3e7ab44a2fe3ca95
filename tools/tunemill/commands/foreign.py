"""``tunemill evaluate --csv``: a report on predictions from elsewhere, without a store.

The columns of the table are named by options; the page, the tables and the JSON file are those of the
stage, in a folder of one's choice.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from tunemill.errors import UsageError
from tunemill.files import sha256_file
from tunemill.group import speaks
from tunemill.progress import Progress
from tunemill.recipe import Choice, resolve
from tunemill.stages import known_keys, load_stage
from tunemill.task import ANSWER_KINDS

MISSING = {
    "gold": "name the column of the true answers",
    "predicted": "name the column of the answers to judge",
    "output": "name the folder for the report",
}
TAB = {"tab": "\t", "\\t": "\t"}
SINGLE = (["separator"], ["answer_kind"])
OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--csv", {"metavar": "FILE", "help": "Judge this table from elsewhere instead; needs no store."}),
    ("--gold", {"metavar": "COLUMN", "help": "With --csv: the true answer."}),
    ("--predicted", {"metavar": "COLUMN", "help": "With --csv: the answer to judge."}),
    ("--id", {"metavar": "COLUMN", "help": "With --csv: what rows are called.  [default: 1, 2, 3 …]"}),
    ("--text", {"metavar": "COLUMN", "help": "With --csv: the text, shown beside worst confusions."}),
    (
        "--coder",
        {"metavar": "COLUMN", "multiple": True, "help": "With --csv: what a person answered. Repeatable."},
    ),
    (
        "--dimension",
        {"metavar": "COLUMN", "help": "With --csv: what of its text a row is about."},
    ),
    (
        "--versus",
        {
            "metavar": "COLUMN",
            "multiple": True,
            "help": "With --csv: another model's answers. Repeatable.",
        },
    ),
    ("--item", {"metavar": "COLUMN", "help": "With --csv: the text's id, where it has several rows."}),
    (
        "--probabilities",
        {"metavar": "PREFIX", "help": "With --csv: label L's probability is in the column PREFIX and L."},
    ),
    (
        "--separator",
        {"metavar": "TEXT", "help": "With --csv: answers are several labels with this between them."},
    ),
    (
        "--levels",
        {"metavar": "LABELS", "help": "With --csv: the labels, the lowest first, with commas between."},
    ),
    (
        "--answer-kind",
        {"type": click.Choice(ANSWER_KINDS), "help": "With --csv: answers are free, not of a set of labels."},
    ),
    (
        "--delimiter",
        {"metavar": "CHARACTER", "help": "With --csv: what is between columns, or 'tab'.  [default: ,]"},
    ),
    ("--corpus", {"metavar": "FILE", "help": "With --csv: table of predictions to correct prevalences for."}),
    ("--output", {"metavar": "DIRECTORY", "help": "With --csv: where the report goes."}),
)


def options(command: Any) -> Any:
    """Add the options of a table to the command of the evaluate stage."""
    for name, told in reversed(OPTIONS):
        command = click.option(name, f"table_{name[2:].replace('-', '_')}", **told)(command)
    return command


def taken(choice: dict[str, Any]) -> dict[str, Any]:
    """Take the options of a table out of a command's; those that were given, without their prefix.

    Raises:
        UsageError: there are some, but no table.
    """
    names = [name for name in choice if name.startswith("table_")]
    given = {name.removeprefix("table_"): choice.pop(name) for name in names}
    given = {name: value for name, value in given.items() if value not in (None, ())}
    if given and "csv" not in given:
        raise UsageError(f"--{next(iter(given)).replace('_', '-')} goes with --csv FILE: name the table too")
    return given


def judge_table(given: Mapping[str, Any], choice: Mapping[str, Any], as_json: bool) -> None:
    """Write the report on a table and print where it is, or its figures as JSON.

    Raises:
        UsageError: an option is missing, or two do not go together.
        BadDataError: the table cannot be judged.
    """
    columns, kind = _columns(given), _answers(given)
    chosen = resolve(Choice(file=choice["recipe_file"], settings=choice["settings"]), known_keys())
    config = chosen.configure(load_stage("evaluate"))
    from tunemill.evaluate.baselines import Training
    from tunemill.evaluate.bootstrap import clusters_of
    from tunemill.evaluate.evaluate import facts, judge
    from tunemill.evaluate.foreign import read_corpus, read_csv, read_others
    from tunemill.evaluate.report import write

    path, corpus = Path(given["csv"]), Path(given["corpus"]) if "corpus" in given else None
    predictions = read_csv(path, columns, kind, corpus)
    whole = read_corpus(corpus, columns, kind, predictions.task) if corpus else None
    others = read_others(path, columns, kind, predictions)
    clusters = clusters_of(predictions.items or predictions.ids)
    judged = judge(predictions, Training(), clusters, config, Progress(quiet=not speaks()), whole, others)
    output = Path(given["output"])
    mapping = {name: value for name, value in given.items() if name not in ("csv", "corpus", "output")}
    provenance = [_input("predictions", path, mapping), *([_input("corpus", corpus, {})] if corpus else [])]
    command = _command(given, choice["settings"])
    write(output, judged, provenance, config.model_dump(exclude={"quant"}), command, config)
    page = output / "report.html"
    click.echo(json.dumps({"report": str(page), "facts": facts(judged)}) if as_json else str(page))


def _columns(given: Mapping[str, Any]) -> Any:
    """Return what is where in the table.

    Raises:
        UsageError: a column that is needed was not named.
    """
    from tunemill.evaluate.foreign import Columns

    for name in ("gold", "predicted", "output"):
        if name not in given:
            raise UsageError(f"--csv needs --{name}: {MISSING[name]}")
    if "dimension" in given and "item" not in given:
        raise UsageError("--dimension needs --item: name the column with the text's own id")
    delimiter = TAB.get(given.get("delimiter", ","), given.get("delimiter", ","))
    if len(delimiter) != 1 or (not delimiter.isprintable() and delimiter != "\t"):
        raise UsageError(f"--delimiter takes one character or 'tab', got {delimiter!r}")
    named = {name: given[name] for name in ("id", "text", "dimension", "item") if name in given}
    return Columns(
        given["gold"],
        given["predicted"],
        **named,
        coders=tuple(given.get("coder", ())),
        versus=tuple(given.get("versus", ())),
        probability_prefix=given.get("probabilities"),
        delimiter=delimiter,
    )


def _answers(given: Mapping[str, Any]) -> Any:
    """Return what the answers are.

    Raises:
        UsageError: options contradict each other, or there are fewer than two levels.
    """
    from tunemill.evaluate.foreign import Answers

    exclusive = [name for name in ("separator", "levels", "answer_kind") if name in given]
    if len(exclusive) > 1:
        first, second = (f"--{name.replace('_', '-')}" for name in exclusive[:2])
        raise UsageError(f"{first} and {second} exclude each other: give one")
    single = [name for name in ("coder", "dimension") if name in given and exclusive[:1] in SINGLE]
    if single:
        raise UsageError(f"--{single[0]} is for one label per row: leave out {exclusive[0]}")
    levels = tuple(level.strip() for level in given.get("levels", "").split(",") if level.strip())
    if "levels" in given and (len(levels) < 2 or len(set(levels)) < len(levels)):
        raise UsageError(f"--levels takes two labels or more, each once, got {given['levels']!r}")
    return Answers(given.get("separator"), levels, given.get("answer_kind"))


def _input(role: str, path: Path, mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": role, "reference": path.name, "content": sha256_file(path), "facts": dict(mapping)}


def _command(given: Mapping[str, Any], settings: Sequence[str]) -> str:
    """Return the command that makes the report again."""
    words = ["tunemill", "evaluate"]
    for name, value in given.items():
        for one in value if isinstance(value, tuple) else (value,):
            words += [f"--{name.replace('_', '-')}", str(one)]
    for setting in settings:
        words += ["--set", setting]
    return shlex.join(words)

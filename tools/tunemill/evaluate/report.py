"""The report: one page for people, the same figures as JSON and CSV, and tables for a paper."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunemill.evaluate import sections
from tunemill.evaluate.config import EvaluateConfig
from tunemill.evaluate.evaluate import as_record
from tunemill.evaluate.figures import Judged
from tunemill.evaluate.page import Block, Code, Heading, Listing, Page, Section, Tile, Words, html
from tunemill.evaluate.tables import NAME, REFERENCE, Column, Table, as_csv, latex_file, spread, written
from tunemill.files import write_json, write_text

IN_PAPERS = (
    *("headline", "baselines", "classes", "dimensions", "kinds", "agreement", "prevalence"),
    *("models", "differences", "f1", "learning-curve"),
)
"""Tables that the LaTeX file holds; the others are for looking things up."""


def write(
    output: Path,
    judged: Judged,
    provenance: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    command: str,
    config: EvaluateConfig,
) -> None:
    """Write report.html, report.json, report.tex and a CSV file of each table into ``output``.

    ``provenance`` has role, reference, content, facts and, where they are known, ancestors of each input.
    """
    page = report_page(judged, provenance, settings, command, config)
    record = {**as_record(judged), "settings": dict(settings), "inputs": list(provenance), "command": command}
    write_json(output / "report.json", record)
    write_page(output, "report", page)


def write_page(output: Path, name: str, page: Page) -> None:
    """Write a page as ``NAME.html``, its tables as CSV files, and those that papers print as ``NAME.tex``."""
    tables = page.tables()
    for table in tables:
        write_text(output / f"{table.name}.csv", as_csv(table))
    write_text(output / f"{name}.tex", latex_file([table for table in tables if table.name in IN_PAPERS]))
    write_text(output / f"{name}.html", html(page))


def report_page(
    judged: Judged,
    provenance: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    command: str,
    config: EvaluateConfig,
) -> Page:
    """Lay out what applies to these predictions."""
    main, *others = judged.headlines
    kind = sections.kind_of(main.name)
    named = next((one["reference"] for one in provenance if one["role"] == "predictions"), "predictions")
    return Page(
        subject=f"Tunemill report · {str(named).partition('@')[0]}",
        headline=written(kind, main.interval),
        what=f"{main.title.lower()}, {spread(kind, main.interval)}",
        summary=_summary(judged),
        tiles=tuple(_tile(figure.title, sections.kind_of(figure.name), figure.interval) for figure in others),
        sections=sections.present(
            sections.headlines(judged),
            sections.baselines(judged),
            sections.classes(judged),
            sections.confusion(judged),
            sections.worst(judged, config),
            sections.answers(judged),
            sections.dimensions(judged),
            sections.calibration(judged),
            sections.agreement(judged),
            sections.prevalence(judged),
            sections.failed(judged),
            origin(provenance, settings, command),
        ),
    )


def command_of(provenance: Sequence[Mapping[str, Any]], config: EvaluateConfig) -> str:
    """Return the command that makes the report again from the same artifacts."""
    by_role = {one["role"]: one["reference"] for one in provenance}
    words = ["tunemill", "evaluate", "--run", by_role.get("predictions", "").partition("/")[0]]
    for role, reference in by_role.items():
        words += ["--input", f"{role}={reference}"]
    defaults = EvaluateConfig().model_dump()
    for key, value in config.model_dump().items():
        if value != defaults[key]:
            words += ["--set", f"{key}={value}"]
    return shlex.join(words)


def origin(provenance: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], command: str) -> Section:
    """Show what everything was made from, oldest first, and how it is made again."""
    chain = _chain(provenance)
    blocks: list[Block] = []
    if chain:
        blocks.append(Listing(Table("provenance", CHAIN, ANCESTOR, tuple(map(_ancestor, chain)))))
    for one in chain:
        if one.get("settings"):
            blocks.append(Code(_listed(one["settings"]), f"what was set for {one['stage']}, {_name(one)}"))
    inputs = tuple((one["role"], one["reference"], one["content"]) for one in provenance)
    blocks.append(Listing(Table("inputs", "What was judged; sha256 is over the files alone.", INPUT, inputs)))
    for one in provenance:
        if one.get("facts"):
            blocks.append(Code(_listed(one["facts"]), f"what was found out while {_name(one)} was made"))
    blocks += [Code(_listed(settings), "settings of this report")] if settings else []
    blocks += [Heading("To make this page again"), Code(command)]
    blocks.append(Words("All figures are in the JSON and CSV files beside this page.", soft=True))
    return Section("provenance", "Where this comes from", tuple(blocks))


CHAIN = "Every artifact on the way, oldest first, with the digest of its manifest."
ANCESTOR = (
    Column("stage", "Stage", NAME),
    Column("reference", "Artifact", REFERENCE),
    Column("made", "Made", NAME),
    Column("image", "Image", REFERENCE),
)
INPUT = (
    Column("role", "Input", NAME),
    Column("reference", "Artifact", REFERENCE),
    Column("content", "sha256", REFERENCE),
)


def _chain(provenance: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return every ancestor once, each after what it was made from."""
    found = {one["reference"]: one for given in provenance for one in given.get("ancestors") or ()}
    return list(found.values())


def _ancestor(one: Mapping[str, Any]) -> tuple[Any, ...]:
    if one["stage"] is None:
        return "not in this store", one["reference"], None, None
    made = f"Tunemill {one['tool_version']}, {one['finished']}"
    made += f", llama.cpp {one['llama_cpp']}" if one["llama_cpp"] else ""
    made += "; published against its parity check" if one["published_against_parity"] else ""
    return one["stage"], one["reference"], made, one["image"]


def _name(one: Mapping[str, Any]) -> str:
    return str(one["reference"]).partition("@")[0]


def _summary(judged: Judged) -> str:
    figures, task = judged.figures, judged.predictions.task
    said = f"{figures.rows} rows"
    if task.labels:
        said += f", {len(task.labels)} labels"
    if task.dimensions:
        said += f", {len(task.dimensions)} dimensions"
    if figures.errors:
        said += f"; {figures.errors} without an answer count as wrong"
    return f"{said}."


def _tile(title: str, kind: str, interval: Any) -> Tile:
    return Tile(title, written(kind, interval), spread(kind, interval))


def _listed(values: Mapping[str, Any]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in sorted(values.items()))

"""``tunemill convert --join``: one file of a GGUF that came in several."""

from __future__ import annotations

import json
from pathlib import Path

import click

from tunemill.errors import UsageError
from tunemill.ggufs import PART, parts_of
from tunemill.progress import Progress


def join_parts(name: str, as_json: bool) -> None:
    """Write the model beside its parts, named without their numbers, and print where.

    Raises:
        UsageError: it is no part of a GGUF, or the file is there already.
        BadDataError: parts are missing or damaged.
        TransientError: the disk is full.
    """
    from tunemill.gguf.parts import join

    given = Path(name)
    match = PART.fullmatch(given.name)
    if match is None or not given.is_file():
        raise UsageError(f"--join takes a part of a GGUF, such as model-F16-00001-of-00003.gguf, not {name}")
    target = given.with_name(f"{match['stem']}.gguf")
    if target.exists():
        raise UsageError(f"{target} is there already: move it away, or use it")
    parts = parts_of(given)
    total = sum(path.stat().st_size for path in parts if path.exists())
    with Progress().task(f"join {target.name}", total, "B") as task:
        join(parts[0], target, task.advance)
    click.echo(json.dumps({"path": str(target), "parts": len(parts)}) if as_json else str(target))

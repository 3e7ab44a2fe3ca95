"""A GGUF model in one file, or split into several that llama.cpp loads by the first.

Shared by what pulls a model and what runs it. A split model that lacks a part is refused before
anything loads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tunemill.errors import BadDataError

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def first_part(names: Iterable[str]) -> str:
    """Return the file that loads the one model among ``names``.

    Raises:
        BadDataError: there is none, there are several, or parts are missing.
    """
    found = sorted(name for name in names if name.endswith(".gguf"))
    if len(found) == 1 and not PART.fullmatch(found[0]):
        return found[0]
    parts = [match for name in found if (match := PART.fullmatch(name))]
    if not parts or len(parts) != len(found) or len({(part["stem"], part["count"]) for part in parts}) != 1:
        raise BadDataError(f"expected one GGUF model, found {', '.join(found) or 'none'}")
    wanted = set(range(1, int(parts[0]["count"]) + 1))
    if missing := wanted - {int(part["number"]) for part in parts}:
        raise BadDataError(f"part {min(missing)} of {len(wanted)} of {parts[0]['stem']}.gguf is missing")
    return found[0]


def find_gguf(directory: Path) -> Path:
    """Return the one model of a directory; of a split one the first part, which loads the others.

    Raises:
        BadDataError: there is none, there are several, or parts are missing.
    """
    return directory / first_part(path.name for path in directory.glob("*.gguf"))


def parts_of(first: Path) -> list[Path]:
    """Return the files of the model that ``first`` loads, in their order."""
    match = PART.fullmatch(first.name)
    if match is None:
        return [first]
    count = int(match["count"])
    return [first.with_name(f"{match['stem']}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]

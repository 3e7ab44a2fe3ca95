"""A GGUF model in one file, or split into several that llama.cpp loads by the first.

Shared by what pulls a model and what runs it. A split model that lacks a part is refused before
anything loads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

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

"""Matches modules' names against an adapter's patterns, which PEFT takes as regular expressions.

An adapter comes from anywhere, and an expression of ten characters can take for ever on a name of forty.
So those that are more than names are matched in a process of their own, by Python's own engine, as PEFT
does, with an end in time and memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from tunemill.errors import BadDataError

LONGEST = 200  # characters of a pattern
SECONDS = 10  # for all names of an adapter; sound expressions take milliseconds
PLAIN = re.compile(r"(?:\w|\\?\.|-)+")
"""Names, whose dots match any character: no way to go back and forth."""
CHILD = r"""
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
except (ImportError, ValueError, OSError):
    pass  # macOS has no such limit; the end in time holds there too
patterns, names = json.load(sys.stdin)
try:
    compiled = [re.compile(rf"(.*\.)?({pattern})$") for pattern in patterns]
    found = [next((i for i, one in enumerate(compiled) if one.match(name)), None) for name in names]
except (re.error, RecursionError, OverflowError, MemoryError) as error:
    json.dump({"error": str(error) or type(error).__name__}, sys.stdout)
else:
    json.dump(found, sys.stdout)
"""


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> list[str | None]:
    """Return for each name the first pattern that matches its end, or None.

    Raises:
        BadDataError: a pattern is too long, no regular expression, or does not come to an end.
    """
    for pattern in patterns:
        if len(pattern) > LONGEST:
            raise BadDataError(f"it has a pattern of {len(pattern)} characters, above {LONGEST}")
    if all(PLAIN.fullmatch(pattern) for pattern in patterns):
        compiled = [re.compile(rf"(.*\.)?({pattern})$") for pattern in patterns]
        found = [next((i for i, one in enumerate(compiled) if one.match(name)), None) for name in names]
    else:
        found = _apart(patterns, names)
    return [None if place is None else patterns[place] for place in found]


def _apart(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    shown = ", ".join(repr(pattern[:60]) for pattern in patterns[:3])
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-c", CHILD],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        ).stdout
    except subprocess.TimeoutExpired:
        raise BadDataError(f"its patterns ({shown}) take above {SECONDS} s to match") from None
    except subprocess.CalledProcessError:
        raise BadDataError(f"its patterns ({shown}) cannot be matched") from None
    found = json.loads(answer)
    if isinstance(found, dict):
        raise BadDataError(f"its patterns ({shown}) are no regular expressions: {found['error'][:100]}")
    return list(found)

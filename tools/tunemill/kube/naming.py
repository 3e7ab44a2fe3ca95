"""When two requests are the same work, and what their Job is called.

The name comes from the action key, as the output's tag does, so that the second request finds the first
one's Job. Where the store cannot be asked from here there is no action key; what was asked for is hashed
in its place, which tells less: the inputs may have changed meanwhile, so a finished Job of that name
proves nothing and the stage has to look in the store itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence

from tunemill import __version__

# A pod of an Indexed Job is called <job>-<index>, and that must be a DNS label of at most 63 characters.
LONGEST = 63 - len("-99999")
DIGITS = 10


def request_key(stage: str, settings: Mapping[str, object], words: Sequence[str], salt: str = "") -> str:
    """Return 64 hex digits over the resolved configuration and the arguments of a request."""
    asked = {
        "tool": __version__,
        "stage": stage,
        "config": dict(settings),
        "words": list(words),
        "salt": salt,
    }
    text = json.dumps(asked, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def job_name(stage: str, run: str, key: str) -> str:
    """Return ``<stage>-<run>-<first digits of the key>``, the run shortened until it is a DNS label."""
    room = LONGEST - len(stage) - DIGITS - 2
    safe = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")[:room].strip("-")
    return "-".join(part for part in (stage, safe, key[:DIGITS]) if part)

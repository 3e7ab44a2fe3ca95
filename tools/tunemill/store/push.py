"""Push: a directory that no stage made becomes an artifact, with what is known of it as provenance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunemill import __version__
from tunemill.errors import UsageError
from tunemill.store.manifest import Draft
from tunemill.store.provenance import Provenance
from tunemill.store.store import Store

KINDS = (
    *("base", "data", "adapter", "merged", "gguf", "imatrix"),
    *("predictions", "report", "checkpoint"),
)


def draft(
    store: Store,
    directory: Path,
    name: str,
    kind: str,
    tags: Sequence[str],
    inputs: Mapping[str, str],
    host: Mapping[str, Any],
) -> Draft:
    """Return a draft of every file below ``directory``; ``inputs`` are roles to references of any form.

    Raises:
        UsageError: the kind is unknown, there is no such directory, or an input does not exist.
    """
    if kind not in KINDS:
        raise UsageError(f"'{kind}' is no kind of artifact: expected one of {', '.join(KINDS)}")
    if not directory.is_dir():
        raise UsageError(f"there is no directory {directory} to push")
    found = {role: store.resolve(reference).reference for role, reference in inputs.items()}
    # Only the folder's own name: where it lay on this machine is nobody's business.
    config = {"directory": directory.resolve().name}
    now = datetime.now(UTC)
    provenance = Provenance(
        stage="push",
        tool_version=__version__,
        config=config,
        origins={"directory": "flag"},
        inputs=found,
        host=host,
        action_key=_key(config, found),
        image=None,
        llama_cpp=None,
        started=now,
        finished=now,
    )
    return Draft(name=name, kind=kind, directory=directory, facts={}, provenance=provenance, tags=tuple(tags))


def _key(config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Nothing is ever looked up by it: a push has its files from outside, whatever its settings."""
    text = json.dumps(["push", __version__, config, inputs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

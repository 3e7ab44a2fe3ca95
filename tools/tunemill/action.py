"""The action key: when two runs of a stage are the same, so that the second need not happen.

It is a sha256 over canonical JSON of everything that decides a result: tool version, stage, configuration,
the inputs' contents (not their names), what else the work reads, and the host class where the output is
bound to it. Settings that only change how the work runs (threads, timeouts) are left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from tunemill import __version__
from tunemill.host import Host
from tunemill.work import Stage, StageConfig

TAG_DIGITS = 32  # hex digits of the key in its tag: 128 bits never collide by chance


def action_key(
    stage: Stage[Any], config: StageConfig, contents: Mapping[str, str], reads: Mapping[str, str], host: Host
) -> str:
    """Return 64 hex digits; ``contents`` maps input roles to content digests."""
    action: dict[str, Any] = {
        "tool": __version__,
        "stage": stage.name,
        "config": identity(config),
        "inputs": dict(contents),
        "reads": dict(reads),
    }
    if stage.binds_host:
        action["host"] = host.host_class
    text = json.dumps(action, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()


def action_tag(key: str) -> str:
    """Return the tag under which an action's output is found."""
    return f"action-{key[:TAG_DIGITS]}"


def resolved(config: StageConfig) -> dict[str, Any]:
    """Return the configuration as plain JSON values.

    Optional keys that nobody set are left out: train alone has 150 of them, which mean the library's
    default. One that was set to null stays.
    """
    values = config.model_dump(mode="json")
    return {
        key: value for key, value in values.items() if value is not None or key in config.model_fields_set
    }


def identity(config: StageConfig) -> dict[str, Any]:
    """Return the part of the configuration that decides the result."""
    return {key: value for key, value in resolved(config).items() if _decides(type(config), key)}


def _decides(config: type[StageConfig], key: str) -> bool:
    extra = config.model_fields[key].json_schema_extra
    return not isinstance(extra, dict) or extra.get("identity") is not False

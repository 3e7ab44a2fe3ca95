"""Provenance: how an artifact came to be, as an in-toto statement with a SLSA provenance predicate.

It is one more blob of every manifest. From any artifact one can walk back through the inputs named here
to base weights, data and every setting. Formats: in-toto Statement v1, SLSA provenance v1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunemill.errors import BadDataError

LARGEST_STATEMENT = 4 << 20  # bytes
STATEMENT_TYPE = "application/vnd.in-toto+json"
STATEMENT_PATH = "provenance.intoto.json"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "https://tunemill.invalid/stage/v1"  # a name, on purpose not an address


@dataclass(frozen=True)
class Provenance:
    """Everything that decided an artifact's content, and when and where it was made."""

    stage: str
    tool_version: str
    config: Mapping[str, Any]
    """The stage's resolved configuration, plain JSON values."""
    origins: Mapping[str, str]
    """Key of ``config`` to where its value came from: default, recipe, file or flag."""
    inputs: Mapping[str, str]
    """Role to ``name@sha256:<hex>``."""
    host: Mapping[str, Any]
    action_key: str
    image: str | None
    """Digest of the container image, None outside of one."""
    llama_cpp: str | None
    """Commit or version of llama.cpp, None where it took no part."""
    started: datetime
    finished: datetime


def encode_statement(provenance: Provenance, subjects: Sequence[tuple[str, str]]) -> bytes:
    """Return the statement over ``subjects`` of (path, hex sha256), checked by the in-toto library.

    Raises:
        BadDataError: a value is no plain JSON, or the statement is larger than 4 MiB.
    """
    raise NotImplementedError


def parse_statement(data: bytes) -> Provenance:
    """Parse a statement strictly; it came from outside.

    Raises:
        BadDataError: it is malformed, naming the place.
    """
    raise NotImplementedError

"""Provenance: how an artifact came to be, as an in-toto statement with a SLSA provenance predicate.

It is one more blob of every manifest. From any artifact one can walk back through the inputs named here
to base weights, data and every setting. Formats: in-toto Statement v1, SLSA provenance v1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunemill.errors import BadDataError

LARGEST_STATEMENT = 4 << 20  # bytes
STATEMENT_TYPE = "application/vnd.in-toto+json"
STATEMENT_PATH = "provenance.intoto.json"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:tunemill:stage:v1"
BUILDER = "urn:tunemill"
SCHEME = "tunemill:"  # makes a reference a URI, as resource descriptors want it


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


_MODEL = ConfigDict(extra="forbid", frozen=True, strict=True)
_HEX = Field(pattern=r"^[0-9a-f]{64}$")


class _Digest(BaseModel):
    model_config = _MODEL
    sha256: str = _HEX


class _Subject(BaseModel):
    model_config = _MODEL
    name: str = Field(max_length=4096)
    digest: _Digest


class _Dependency(BaseModel):
    model_config = _MODEL
    name: str = Field(max_length=255)
    uri: str = Field(pattern=r"^tunemill:[a-z0-9._/-]+@sha256:[0-9a-f]{64}$")
    digest: _Digest


class _External(BaseModel):
    model_config = _MODEL
    stage: str = Field(max_length=255)
    config: dict[str, Any]
    origins: dict[str, str]


class _Internal(BaseModel):
    model_config = _MODEL
    action_key: str = Field(alias="actionKey", max_length=255)
    host: dict[str, Any]
    image: str | None
    llama_cpp: str | None = Field(alias="llamaCpp")


class _Definition(BaseModel):
    model_config = _MODEL
    build_type: Literal["urn:tunemill:stage:v1"] = Field(alias="buildType")
    external: _External = Field(alias="externalParameters")
    internal: _Internal = Field(alias="internalParameters")
    dependencies: list[_Dependency] = Field(alias="resolvedDependencies", max_length=1000)


class _Version(BaseModel):
    model_config = _MODEL
    tunemill: str = Field(max_length=255)


class _Builder(BaseModel):
    model_config = _MODEL
    id: Literal["urn:tunemill"]
    version: _Version


class _Metadata(BaseModel):
    model_config = _MODEL
    started: datetime = Field(alias="startedOn")
    finished: datetime = Field(alias="finishedOn")


class _Run(BaseModel):
    model_config = _MODEL
    builder: _Builder
    metadata: _Metadata


class _Predicate(BaseModel):
    model_config = _MODEL
    definition: _Definition = Field(alias="buildDefinition")
    run: _Run = Field(alias="runDetails")


class _Statement(BaseModel):
    model_config = _MODEL
    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: list[_Subject] = Field(min_length=1)
    predicate_type: Literal["https://slsa.dev/provenance/v1"] = Field(alias="predicateType")
    predicate: _Predicate


def encode_statement(provenance: Provenance, subjects: Sequence[tuple[str, str]]) -> bytes:
    """Return the statement over ``subjects`` of (path, hex sha256), checked by the in-toto library.

    Raises:
        BadDataError: a value is no plain JSON, a time has no zone, or it is larger than 4 MiB.
    """
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": path, "digest": {"sha256": digest}} for path, digest in subjects],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "stage": provenance.stage,
                    "config": dict(provenance.config),
                    "origins": dict(provenance.origins),
                },
                "internalParameters": {
                    "actionKey": provenance.action_key,
                    "host": dict(provenance.host),
                    "image": provenance.image,
                    "llamaCpp": provenance.llama_cpp,
                },
                "resolvedDependencies": [
                    _dependency(role, provenance.inputs[role]) for role in sorted(provenance.inputs)
                ],
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": {"tunemill": provenance.tool_version}},
                "metadata": {
                    "startedOn": _time(provenance.started),
                    "finishedOn": _time(provenance.finished),
                },
            },
        },
    }
    try:
        data = json.dumps(statement, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise BadDataError(f"provenance has to be plain JSON values: {error}") from error
    if len(data) > LARGEST_STATEMENT:
        raise BadDataError(f"provenance would have {len(data)} bytes, more than {LARGEST_STATEMENT}")
    _check_with_library(statement)
    parse_statement(data)  # what cannot be read back is not written
    return data


def _dependency(role: str, reference: str) -> dict[str, Any]:
    hexadecimal = reference.rpartition("@sha256:")[2]
    return {"name": role, "uri": SCHEME + reference, "digest": {"sha256": hexadecimal}}


def _time(value: datetime) -> str:
    if value.tzinfo is None:
        raise BadDataError(f"provenance has the time {value.isoformat()} without a zone")
    return value.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _check_with_library(statement: dict[str, Any]) -> None:
    # Only checked by it, not written: its protobuf values turn every integer into a float.
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.statement import Statement

    try:
        parsed = json_format.ParseDict(statement, statement_pb2.Statement())
        Statement.copy_from_pb(parsed).validate()
        json_format.ParseDict(statement["predicate"], provenance_pb2.Provenance())
    except (json_format.ParseError, ValueError) as error:
        raise BadDataError(f"provenance is no valid in-toto statement: {error}") from error


def parse_statement(data: bytes) -> Provenance:
    """Parse a statement strictly; it came from outside.

    Raises:
        BadDataError: it is malformed, naming the place.
    """
    try:
        statement = _Statement.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BadDataError(f"provenance is malformed at '{place}': {first['msg']}") from error
    definition, run = statement.predicate.definition, statement.predicate.run
    return Provenance(
        stage=definition.external.stage,
        tool_version=run.builder.version.tunemill,
        config=definition.external.config,
        origins=definition.external.origins,
        inputs={each.name: each.uri.removeprefix(SCHEME) for each in definition.dependencies},
        host=definition.internal.host,
        action_key=definition.internal.action_key,
        image=definition.internal.image,
        llama_cpp=definition.internal.llama_cpp,
        started=run.metadata.started,
        finished=run.metadata.finished,
    )

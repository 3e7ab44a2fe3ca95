"""Provenance: a valid in-toto statement that gives back exactly what was put in."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from tunemill.errors import BadDataError
from tunemill.store import Provenance
from tunemill.store.provenance import encode_statement, parse_statement

SUBJECTS = [("model.safetensors", "a" * 64), ("config.json", "b" * 64)]
Make = Callable[..., Provenance]


def test_what_is_written_is_read_back(make_provenance: Make) -> None:
    made = make_provenance(image="sha256:1", llama_cpp="b1234")
    assert parse_statement(encode_statement(made, SUBJECTS)) == made
    assert isinstance(parse_statement(encode_statement(made, SUBJECTS)).config["seed"], int)


def test_it_is_an_in_toto_statement_with_slsa_provenance(make_provenance: Make) -> None:
    value = json.loads(encode_statement(make_provenance(), SUBJECTS))
    assert value["_type"] == "https://in-toto.io/Statement/v1"
    assert value["predicateType"] == "https://slsa.dev/provenance/v1"
    assert value["subject"][0] == {"name": "model.safetensors", "digest": {"sha256": "a" * 64}}
    dependency = value["predicate"]["buildDefinition"]["resolvedDependencies"][0]
    assert (dependency["name"], dependency["digest"]) == ("base", {"sha256": "1" * 64})
    assert value["predicate"]["runDetails"]["metadata"]["startedOn"] == "2026-01-02T03:04:05.000678Z"


def test_the_same_provenance_gives_the_same_bytes(make_provenance: Make) -> None:
    assert encode_statement(make_provenance(), SUBJECTS) == encode_statement(make_provenance(), SUBJECTS)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"config": {"x": float("inf")}}, "plain JSON", id="infinite"),
        pytest.param({"config": {"x": object()}}, "plain JSON", id="object"),
        pytest.param({"config": {"x": "y" * (5 << 20)}}, "more than 4194304", id="large"),
        pytest.param({"started": datetime(2026, 1, 1)}, "without a zone", id="no zone"),
        pytest.param({"inputs": {"base": "base/tiny"}}, "resolvedDependencies", id="input without digest"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(
    make_provenance: Make, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BadDataError, match=reason):
        encode_statement(make_provenance(**changes), SUBJECTS)


def test_the_library_refuses_a_statement_about_nothing(make_provenance: Make) -> None:
    with pytest.raises(BadDataError, match="no valid in-toto statement"):
        encode_statement(make_provenance(), [])


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("_type",), "https://in-toto.io/Statement/v0.1"),
        (("predicateType",), "x"),
        (("predicate", "more"), 1),
        (("predicate", "buildDefinition", "externalParameters", "stage"), 3),
        (("predicate", "runDetails", "metadata", "startedOn"), "yesterday"),
        (("subject",), []),
    ],
)
def test_a_malformed_statement_is_named(make_provenance: Make, place: tuple[str, ...], value: Any) -> None:
    statement = json.loads(encode_statement(make_provenance(), SUBJECTS))
    inner = statement
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    with pytest.raises(BadDataError, match="provenance is malformed at") as caught:
        parse_statement(json.dumps(statement).encode())
    assert "\n" not in str(caught.value)

"""Verification names the broken link, whichever of them it is."""

from __future__ import annotations

import hashlib
import json

import pytest

from tunemill.errors import IntegrityError, UsageError
from tunemill.store import keys
from tunemill.store.verify import refuse_broken, verify, verify_names

WEIGHTS = b"weights" * 1000


@pytest.fixture
def chain(store, make_draft, make_provenance, progress):
    """A base, data made from it, and an adapter made from both; the adapter's artifact."""

    def publish(name, kind, files, inputs):
        made = make_provenance(inputs=inputs)
        return store.publish(make_draft(files, name=name, kind=kind, provenance=made), progress)

    base = publish("base/tiny", "base", {"model.safetensors": WEIGHTS, "config.json": b"{}"}, {})
    data = publish("run/data", "data", {"train.parquet": b"rows"}, {"base": base.reference})
    inputs = {"base": base.reference, "data": data.reference}
    return publish("run/adapter", "adapter", {"adapter_model.safetensors": b"small"}, inputs)


def replace(store, key, data):
    """Damage a store as a failing disk would."""
    store.backend.delete(key)
    if data is not None:
        assert store.backend.put_if_absent(key, data)


def blob(data):
    return keys.blob(hashlib.sha256(data).hexdigest())


def test_intact_lineage_is_read_once(store, chain, progress):
    verdict = verify(store, ["run/adapter", "base/tiny"], progress)
    assert verdict.broken == ()
    assert sorted(name.partition("@")[0] for name in verdict.artifacts) == [
        "base/tiny",
        "run/adapter",
        "run/data",
    ]
    assert verdict.size > len(WEIGHTS)
    refuse_broken(verdict)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        pytest.param(WEIGHTS.swapcase(), "has sha256", id="other bytes"),
        pytest.param(b"short", "has 5 bytes instead of 7000", id="cut short"),
        pytest.param(None, "is missing", id="missing"),
    ],
)
def test_damaged_file_upstream_is_named(store, chain, progress, data, problem):
    replace(store, blob(WEIGHTS), data)
    verdict = verify(store, ["run/adapter"], progress)
    (broken,) = verdict.broken
    assert broken.artifact.startswith("base/tiny@sha256:")
    assert broken.part == "model.safetensors"
    assert problem in broken.problem
    with pytest.raises(IntegrityError, match=r"base/tiny@.*model.safetensors") as caught:
        refuse_broken(verdict)
    assert caught.value.exit_code == 65
    assert "\n" not in str(caught.value)


def test_missing_input_is_a_broken_link(store, chain, progress):
    data = store.resolve("run/data")
    store.backend.delete(keys.manifest(data.digest.removeprefix("sha256:")))
    (broken,) = verify(store, ["run/adapter"], progress).broken
    assert broken.artifact == chain.reference
    assert broken.part == "input data"
    assert data.reference in broken.problem


def test_damaged_manifest_is_named_and_the_rest_still_read(store, chain, progress):
    data = store.resolve("run/data")
    key = keys.manifest(data.digest.removeprefix("sha256:"))
    replace(store, key, json.dumps({"schemaVersion": 2}).encode())
    replace(store, blob(b"small"), b"SMALL")
    broken = verify(store, ["run/adapter"], progress).broken
    assert {(each.artifact, each.part) for each in broken} == {
        (data.reference, "manifest"),
        (chain.reference, "adapter_model.safetensors"),
    }


def test_damaged_provenance_is_named(store, chain, progress):
    statement = store.manifest(chain).provenance
    replace(store, keys.blob(statement.hex), b"?" * statement.size)
    broken = verify(store, ["run/adapter"], progress).broken
    assert (chain.reference, "provenance") in {(each.artifact, each.part) for each in broken}


def test_everything_a_store_shows_is_verified(store, chain, progress):
    store.tag("base/tiny", "v1")
    references = verify_names(store)
    assert "base/tiny:v1" in references
    assert chain.reference in references
    replace(store, blob(b"rows"), b"ROWS")
    assert [each.part for each in verify(store, references, progress).broken] == ["train.parquet"]


def test_unknown_reference_is_a_usage_error(directory_store, progress):
    with pytest.raises(UsageError, match="no/such"):
        verify(directory_store, ["no/such"], progress)

"""Stores of every format ever released can be read, and docs/store-format.md describes what is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tunemill.store import Store, keys, open_store
from tunemill.store.local import LocalBackend
from tunemill.store.verify import verify, verify_names

FORMATS = Path(__file__).parent / "formats"
SPECIFICATION = Path(__file__).parents[2] / "docs" / "store-format.md"


@pytest.fixture(params=[path.name for path in sorted(FORMATS.iterdir())])
def old_store(request, tmp_path):
    shutil.copytree(FORMATS / request.param, tmp_path / "old")
    return Store(LocalBackend(tmp_path / "old"), cache=tmp_path / "cache")


def example(kind):
    """The JSON block of this kind in the specification."""
    (block,) = re.findall(rf"^```json {kind}\n(.*?)^```", SPECIFICATION.read_text(), re.DOTALL | re.MULTILINE)
    return json.loads(block)


def test_old_stores_are_read_whole(old_store, progress, tmp_path):
    references = verify_names(old_store)
    assert references
    missing = verify(old_store, references, progress).broken
    assert all(broken.part == "input base" for broken in missing), "its base was never put there"
    artifact = old_store.resolve("tiny-stdlib/adapter")
    assert artifact.facts == {"loss": 0.5}
    assert old_store.provenance(artifact).config == {"learning_rate": 2e-4, "seed": 42}
    old_store.pull(artifact, tmp_path / "pulled", progress)
    assert (tmp_path / "pulled/adapter_config.json").read_bytes() == b"{}\n"


def test_the_same_artifact_has_the_same_digest_as_ever(make_draft, make_provenance, tmp_path, progress):
    """Publishing into a new store what the oldest one holds gives the same bytes."""
    old = open_store(str(FORMATS / "1")).resolve("tiny-stdlib/adapter")
    backend = LocalBackend(FORMATS / "1")
    made = Store(backend).provenance(old)
    files = {file.path: backend.get(keys.blob(file.digest)) for file in old.files}
    draft = make_draft(files, name=old.name, kind=old.kind, facts=old.facts, provenance=made)
    assert Store(LocalBackend.create(tmp_path / "new")).publish(draft, progress) == old


def test_the_specification_shows_what_is_there():
    backend = LocalBackend(FORMATS / "1")
    (step,) = backend.list(keys.BRANCHES)
    reference = json.loads(backend.get(step.key))
    assert example("reference") == reference
    assert step.key.endswith("/fffffffffffffffe")
    manifest = backend.get(keys.manifest(reference["digest"].removeprefix("sha256:")))
    assert example("manifest") == json.loads(manifest)


def test_the_specification_lists_every_key():
    (block,) = re.findall(r"^## Keys.*?```\n(.*?)^```", SPECIFICATION.read_text(), re.DOTALL | re.MULTILINE)
    listed = {line.split("/")[0] for line in block.splitlines()}
    known = {value.split("/")[0] for value in vars(keys).values() if _is_prefix(value)}
    assert listed == known


def _is_prefix(value):
    return isinstance(value, str) and value.endswith("/")

"""Export to an OCI image layout, judged by skopeo where it is installed."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess

import pytest

from tunemill.errors import IntegrityError, UsageError
from tunemill.store import keys
from tunemill.store.export import export
from tunemill.store.local import LocalBackend

FILES = {"model.safetensors": b"weights" * 1000, "config.json": b"{}", "sub/README.md": b"read me"}

needs_skopeo = pytest.mark.skipif(
    shutil.which("skopeo") is None, reason="skopeo is not installed (Debian: apt-get install skopeo)"
)


def digest(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def exported(store, make_draft, progress, tmp_path):
    artifact = store.publish(make_draft(FILES), progress)
    export(store, artifact, "v1", tmp_path / "layout", progress)
    return artifact, tmp_path / "layout"


def test_layout_holds_what_its_index_names(exported):
    artifact, layout = exported
    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((layout / "index.json").read_text())
    (descriptor,) = index["manifests"]
    assert descriptor["digest"] == artifact.digest
    assert descriptor["annotations"]["org.opencontainers.image.ref.name"] == "v1"
    manifest = json.loads((layout / "blobs/sha256" / artifact.digest[7:]).read_bytes())
    wanted = {blob["digest"][7:]: blob["size"] for blob in [manifest["config"], *manifest["layers"]]}
    wanted[artifact.digest[7:]] = descriptor["size"]
    found = {path.name: path for path in (layout / "blobs/sha256").iterdir()}
    assert {name: path.stat().st_size for name, path in found.items()} == wanted
    assert all(digest(path.read_bytes()) == name for name, path in found.items())
    assert {digest(data) for data in FILES.values()} <= set(found)


@needs_skopeo
def test_skopeo_copies_and_inspects_it(exported, tmp_path):
    artifact, layout = exported
    copy = tmp_path / "copy"
    command = ["skopeo", "--insecure-policy", "copy", f"oci:{layout}:v1", f"oci:{copy}:v2"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    raw = subprocess.run(
        ["skopeo", "inspect", "--raw", f"oci:{copy}:v2"], check=True, capture_output=True, timeout=60
    ).stdout
    assert f"sha256:{digest(raw)}" == artifact.digest, "skopeo rewrote the manifest"
    assert json.loads(raw)["annotations"]["tunemill.name"] == artifact.name
    for path in (layout / "blobs/sha256").iterdir():
        assert (copy / "blobs/sha256" / path.name).read_bytes() == path.read_bytes()


def test_existing_destination_is_refused(directory_store, make_draft, progress, tmp_path):
    artifact = directory_store.publish(make_draft(FILES), progress)
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        export(directory_store, artifact, "v1", tmp_path / "taken", progress)
    assert list((tmp_path / "taken").iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.unlink(), id="missing"),
        pytest.param(lambda path: path.write_bytes(b"WEIGHTS" * 1000), id="other bytes"),
        pytest.param(lambda path: path.write_bytes(b"short"), id="cut short"),
    ],
)
def test_damaged_blob_leaves_nothing(directory_store, make_draft, progress, tmp_path, damage):
    artifact = directory_store.publish(make_draft(FILES), progress)
    assert isinstance(directory_store.backend, LocalBackend)
    blob = directory_store.backend.root / keys.blob(digest(FILES["model.safetensors"]))
    blob.chmod(0o644)
    damage(blob)
    before = set(tmp_path.iterdir())
    with pytest.raises(IntegrityError, match=digest(FILES["model.safetensors"])[:12]) as caught:
        export(directory_store, artifact, "v1", tmp_path / "layout", progress)
    assert caught.value.exit_code == 65
    assert "\n" not in str(caught.value)
    assert set(tmp_path.iterdir()) == before

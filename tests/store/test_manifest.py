"""Manifests: valid OCI and ModelPack, and nothing hostile or damaged gets through the parser."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from backends import MakeDraft
from tunemill.errors import BadDataError, IntegrityError
from tunemill.store import Draft, File
from tunemill.store import manifest as format_module
from tunemill.store.manifest import (
    build_config,
    build_manifest,
    content_digest,
    media_type,
    parse_manifest,
    to_artifact,
)

FILES = [
    File("model.safetensors", "a" * 64, 10),
    File("README.md", "b" * 64, 3),
    File("config.json", "c" * 64, 2),
]
STATEMENT = File("provenance.intoto.json", "d" * 64, 99)


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.fixture
def draft(make_draft: MakeDraft) -> Draft:
    return make_draft({}, facts={"loss": 0.25, "steps": 3, "name": "ä"})


@pytest.fixture
def data(draft: Draft) -> bytes:
    return build_manifest(draft, FILES, STATEMENT, build_config(draft, FILES, STATEMENT))


def test_a_manifest_says_what_was_put_in(data: bytes, draft: Draft) -> None:
    artifact = to_artifact(parse_manifest(data, digest(data)), digest(data))
    assert artifact.reference == f"tiny-stdlib/adapter@{digest(data)}"
    assert artifact.files == tuple(sorted(FILES, key=lambda file: file.path))
    assert (artifact.kind, artifact.size, artifact.facts) == ("adapter", 15, draft.facts)
    assert artifact.content == content_digest("adapter", FILES)


def test_it_is_an_oci_image_manifest_with_modelpack_types(data: bytes) -> None:
    value = json.loads(data)
    assert value["schemaVersion"] == 2
    assert value["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert value["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert value["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    types = {layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"] for layer in value["layers"]}
    assert types == {
        "README.md": "application/vnd.cncf.model.doc.v1.raw",
        "config.json": "application/vnd.cncf.model.weight.config.v1.raw",
        "model.safetensors": "application/vnd.cncf.model.weight.v1.raw",
        "provenance.intoto.json": "application/vnd.in-toto+json",
    }
    assert all(isinstance(text, str) for text in value["annotations"].values())


def test_the_configuration_names_every_layer_in_order(draft: Draft, data: bytes) -> None:
    config = json.loads(build_config(draft, sorted(FILES, key=lambda file: file.path), STATEMENT))
    assert set(config) == {"descriptor", "config", "modelfs"}
    assert config["modelfs"]["diffIds"] == [layer["digest"] for layer in json.loads(data)["layers"]]
    assert config["config"]["format"] == "safetensors"
    assert config["descriptor"]["createdAt"].endswith("+00:00")


@pytest.mark.parametrize(
    ("kind", "path", "expected"),
    [
        ("gguf", "model-Q4_K_M.gguf", "weight"),
        ("data", "train.parquet", "dataset"),
        ("data", "labels.json", "dataset"),
        ("data", "README.md", "doc"),
        ("report", "report.html", "doc"),
        ("base", "LICENSE", "doc"),
        ("base", "tokenizer.json", "weight.config"),
    ],
)
def test_media_types_follow_kind_and_suffix(kind: str, path: str, expected: str) -> None:
    assert media_type(kind, path) == f"application/vnd.cncf.model.{expected}.v1.raw"


def test_content_knows_paths_bytes_and_kind_and_no_order() -> None:
    content = content_digest("adapter", FILES)
    assert content_digest("adapter", FILES[::-1]) == content
    assert content_digest("merged", FILES) != content
    assert content_digest("adapter", [File("x", "a" * 64, 10), *FILES[1:]]) != content
    assert content_digest("adapter", [File("model.safetensors", "e" * 64, 10), *FILES[1:]]) != content


Change = Callable[[dict[str, Any]], None]


def layer(value: dict[str, Any], **changes: Any) -> None:
    value["layers"][0].update(changes)


def path(value: dict[str, Any], text: str) -> None:
    value["layers"][0]["annotations"]["org.cncf.model.filepath"] = text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(lambda v: path(v, "../../etc/cron.d/x"), "neither '.' nor '..'", id="path climbs out"),
        pytest.param(lambda v: path(v, "/etc/passwd"), "is refused", id="absolute path"),
        pytest.param(lambda v: path(v, "x.pkl"), "pickles", id="pickle"),
        pytest.param(lambda v: path(v, "CONFIG.json"), "but case", id="same path in other case"),
        pytest.param(lambda v: path(v, "provenance.intoto.json"), "but case", id="takes provenance's path"),
        pytest.param(lambda v: layer(v, annotations={}), "without org.cncf", id="no path"),
        pytest.param(lambda v: layer(v, size=-1), "layers.0.size", id="negative size"),
        pytest.param(lambda v: layer(v, size="3"), "layers.0.size", id="size as text"),
        pytest.param(lambda v: layer(v, size=1 << 60), "layers.0.size", id="absurd size"),
        pytest.param(lambda v: layer(v, digest="sha256:abc"), "layers.0.digest", id="short digest"),
        pytest.param(lambda v: layer(v, digest="sha256:../x"), "layers.0.digest", id="digest as path"),
        pytest.param(lambda v: layer(v, urls=["http://evil"]), "layers.0.urls", id="foreign layer"),
        pytest.param(
            lambda v: layer(v, mediaType="application/vnd.cncf.model.weight.v1.tar"),
            "layer of type",
            id="tar",
        ),
        pytest.param(lambda v: v.update(subject={}), "'subject'", id="unknown field"),
        pytest.param(lambda v: v.update(schemaVersion=1), "'schemaVersion'", id="other version"),
        pytest.param(lambda v: v.update(layers=[]), "'layers'", id="no layers"),
        pytest.param(lambda v: v["layers"].pop(), "last layer is", id="no provenance"),
        pytest.param(lambda v: v["annotations"].pop("tunemill.kind"), "tunemill.kind", id="no kind"),
        pytest.param(lambda v: v["annotations"].update({"a": "b"}), "'annotations.a'", id="more annotations"),
        pytest.param(
            lambda v: v["annotations"].update({"tunemill.content": "0" * 64}), "content digest", id="content"
        ),
        pytest.param(
            lambda v: v["config"].update(mediaType="application/json"), "configuration of type", id="config"
        ),
    ],
)
def test_what_is_malformed_or_hostile_is_refused(data: bytes, change: Change, reason: str) -> None:
    value = json.loads(data)
    change(value)
    changed = json.dumps(value).encode()
    with pytest.raises(BadDataError, match=reason) as caught:
        parse_manifest(changed, digest(changed))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("facts", ["[]", "{", "null", "[" * 100_000])
def test_facts_have_to_be_an_object(data: bytes, facts: str) -> None:
    value = json.loads(data)
    value["annotations"]["tunemill.facts"] = facts
    changed = json.dumps(value).encode()
    manifest = parse_manifest(changed, digest(changed))
    with pytest.raises(BadDataError, match="facts"):
        to_artifact(manifest, digest(changed))


@pytest.mark.parametrize("text", [b"", b"{}", b"null", b"\xff", b"[" * 100_000])
def test_what_is_no_manifest_is_refused(text: bytes) -> None:
    with pytest.raises(BadDataError, match="is malformed"):
        parse_manifest(text, digest(text))


def test_bytes_have_to_fit_the_digest(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="does not have its digest"):
        parse_manifest(data + b" ", digest(data))


def test_a_manifest_is_at_most_one_mebibyte(make_draft: MakeDraft) -> None:
    draft = make_draft({}, facts={"table": "x" * (1 << 20)})
    with pytest.raises(BadDataError, match="more than 1048576"):
        build_manifest(draft, FILES, STATEMENT, b"{}")


@pytest.mark.parametrize("facts", [{"x": float("nan")}, {"x": {1, 2}}])
def test_facts_have_to_be_plain_values(make_draft: MakeDraft, facts: dict[str, Any]) -> None:
    with pytest.raises(BadDataError, match="plain JSON values"):
        build_manifest(make_draft({}, facts=facts), FILES, STATEMENT, b"{}")


def test_an_artifact_without_files_is_refused(make_draft: MakeDraft) -> None:
    with pytest.raises(BadDataError, match="nothing to publish as tiny-stdlib/adapter"):
        build_manifest(make_draft({}), [], STATEMENT, b"{}")


def test_limits_are_those_of_the_design() -> None:
    assert format_module.LARGEST_MANIFEST == 1 << 20

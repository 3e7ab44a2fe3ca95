"""Manifests: what an artifact is made of, as an OCI image manifest with ModelPack media types.

Each file is one raw layer with its path in an annotation; the provenance statement is one more layer;
kind, content digest and facts are annotations, so looking an artifact up needs its manifest alone. What
comes out of a store was written by others: it is bounded, parsed strictly and checked before use.
Formats: OCI image spec 1.1, CNCF ModelPack model-spec v1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunemill.errors import BadDataError, IntegrityError
from tunemill.store.names import check_name, check_paths
from tunemill.store.provenance import STATEMENT_TYPE, Provenance

LARGEST_MANIFEST = 1 << 20  # bytes
LARGEST_FILE = 1 << 39  # bytes; in 10,000 parts of 53 MiB, which keeps a transfer below 256 MB
MOST_FILES = 10_000

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
CONFIG = "application/vnd.cncf.model.weight.config.v1.raw"
DOCUMENT = "application/vnd.cncf.model.doc.v1.raw"
CODE = "application/vnd.cncf.model.code.v1.raw"
DATASET = "application/vnd.cncf.model.dataset.v1.raw"

FILE_PATH = "org.cncf.model.filepath"
PREDICATE_TYPE = "in-toto.io/predicate-type"
NAME = "tunemill.name"
KIND = "tunemill.kind"
CONTENT = "tunemill.content"
FACTS = "tunemill.facts"


@dataclass(frozen=True)
class File:
    """One file of an artifact."""

    path: str
    """Relative, with ``/``, kept to the rules of ``names.check_paths``."""
    digest: str
    """64 hex digits of the sha256 of its bytes."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Artifact:
    """One published artifact, as its manifest describes it."""

    name: str
    digest: str
    """``sha256:<hex>`` of the manifest."""
    size: int
    """Bytes of all files."""
    kind: str
    content: str
    """64 hex digits over kind and files: equal bytes, equal content."""
    files: tuple[File, ...]
    facts: Mapping[str, Any]

    @property
    def reference(self) -> str:
        """``name@sha256:<hex>``, which never means anything else."""
        return f"{self.name}@{self.digest}"


@dataclass(frozen=True)
class Draft:
    """What is to be published: every file below ``directory``."""

    name: str
    kind: str
    directory: Path
    facts: Mapping[str, Any]
    provenance: Provenance
    tags: tuple[str, ...] = field(default=())


_MODEL = ConfigDict(extra="forbid", frozen=True, strict=True)
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class Descriptor(BaseModel):
    """OCI content descriptor: type, digest and size of one blob."""

    model_config = _MODEL
    media_type: str = Field(alias="mediaType", max_length=255)
    digest: Digest
    size: int = Field(ge=0, le=LARGEST_FILE)
    annotations: dict[str, str] = Field(default_factory=dict)

    @property
    def hex(self) -> str:
        """The 64 hex digits of the digest."""
        return self.digest.removeprefix("sha256:")


class Annotations(BaseModel):
    """What a manifest says of the artifact as a whole."""

    model_config = _MODEL
    name: str = Field(alias=NAME)
    kind: str = Field(alias=KIND, pattern=r"^[a-z][a-z0-9_-]{0,63}$")
    content: str = Field(alias=CONTENT, pattern=r"^[0-9a-f]{64}$")
    facts: str = Field(alias=FACTS)


class Manifest(BaseModel):
    """A parsed manifest. ``layers`` are the files in order of their paths, then the provenance."""

    model_config = _MODEL
    schema_version: Literal[2] = Field(alias="schemaVersion")
    media_type: Literal["application/vnd.oci.image.manifest.v1+json"] = Field(alias="mediaType")
    artifact_type: Literal["application/vnd.cncf.model.manifest.v1+json"] = Field(alias="artifactType")
    config: Descriptor
    layers: list[Descriptor] = Field(min_length=2, max_length=MOST_FILES + 1)
    annotations: Annotations

    @property
    def files(self) -> tuple[File, ...]:
        """The artifact's files; the provenance is none of them."""
        return tuple(File(layer.annotations[FILE_PATH], layer.hex, layer.size) for layer in self.layers[:-1])

    @property
    def provenance(self) -> Descriptor:
        """Where the in-toto statement lies."""
        return self.layers[-1]

    @property
    def blobs(self) -> list[Descriptor]:
        """Every blob the manifest needs: configuration, files and provenance."""
        return [self.config, *self.layers]


def content_digest(kind: str, files: Sequence[File]) -> str:
    """Return 64 hex digits over kind and sorted (path, sha256, size): equal bytes, equal content."""
    lines = [f"kind {kind}"]
    lines += [f"{file.path} {file.digest} {file.size}" for file in sorted(files, key=lambda f: f.path)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def build_config(draft: Draft, files: Sequence[File], statement: File) -> bytes:
    """Return the ModelPack configuration blob of a draft."""
    digests = [f"sha256:{file.digest}" for file in (*files, statement)]
    formats = {Path(file.path).suffix for file in files} & {".safetensors", ".gguf", ".parquet"}
    return _encode(
        {
            "descriptor": {
                "createdAt": draft.provenance.finished.isoformat(),
                "name": draft.name,
                "title": f"{draft.kind} {draft.name}",
            },
            "config": {"format": sorted(formats)[0].removeprefix(".")} if formats else {},
            "modelfs": {"type": "layers", "diffIds": digests},
        }
    )


def build_manifest(draft: Draft, files: Sequence[File], statement: File, config: bytes) -> bytes:
    """Return the manifest's bytes; the same arguments give the same bytes.

    Raises:
        BadDataError: there are no files, too many, or facts that make it larger than 1 MiB.
    """
    check_draft(draft, files)
    layers = [
        _descriptor(media_type(draft.kind, file.path), file.digest, file.size, {FILE_PATH: file.path})
        for file in sorted(files, key=lambda file: file.path)
    ]
    marks = {PREDICATE_TYPE: "https://slsa.dev/provenance/v1", FILE_PATH: statement.path}
    layers.append(_descriptor(STATEMENT_TYPE, statement.digest, statement.size, marks))
    data = _encode(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": ARTIFACT_TYPE,
            "config": _descriptor(CONFIG_TYPE, hashlib.sha256(config).hexdigest(), len(config), {}),
            "layers": layers,
            "annotations": {
                NAME: draft.name,
                KIND: draft.kind,
                CONTENT: content_digest(draft.kind, files),
                FACTS: _encode(dict(draft.facts)).decode(),
            },
        }
    )
    if len(data) > LARGEST_MANIFEST:
        raise BadDataError(
            f"the manifest of {draft.name} would have {len(data)} bytes, more than {LARGEST_MANIFEST}: "
            "keep large findings in a file and only a summary in the facts"
        )
    return data


def check_draft(draft: Draft, files: Sequence[File]) -> None:
    """Pass a draft whose name and number of files may be published.

    Raises:
        UsageError: the name is malformed.
        BadDataError: there are no files, or too many.
    """
    check_name(draft.name)
    if not files:
        raise BadDataError(f"nothing to publish as {draft.name}: {draft.directory} has no files")
    if len(files) > MOST_FILES:
        raise BadDataError(f"{draft.directory} has {len(files)} files, more than {MOST_FILES}")


def media_type(kind: str, path: str) -> str:
    """Return the ModelPack media type of one file of an artifact of this kind."""
    suffix = Path(path).suffix.lower()
    if suffix in (".safetensors", ".gguf"):
        return WEIGHT
    if suffix in (".md", ".txt", ".html", ".svg", ".png") or Path(path).name in ("LICENSE", "NOTICE"):
        return DOCUMENT
    if kind in ("data", "predictions") or suffix in (".parquet", ".csv"):
        return DATASET
    return CODE if suffix == ".py" else CONFIG


def parse_manifest(data: bytes, digest: str) -> Manifest:
    """Check and parse a manifest's bytes, which came from outside.

    Raises:
        IntegrityError: the bytes do not have this digest.
        BadDataError: they are no manifest, or name a path that breaks the rules.
    """
    where = f"manifest {digest[:19]}"
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
        raise IntegrityError(f"{where} does not have its digest: the store was damaged or tampered with")
    try:
        manifest = Manifest.model_validate_json(data)
        check_paths([layer.annotations[FILE_PATH] for layer in manifest.layers])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BadDataError(f"{where} is malformed at '{place}': {first['msg']}") from error
    except KeyError as error:
        raise BadDataError(f"{where} has a layer without {FILE_PATH}") from error
    _check_types(manifest)
    return manifest


def _check_types(manifest: Manifest) -> None:
    known = (WEIGHT, CONFIG, DOCUMENT, CODE, DATASET)
    if manifest.config.media_type != CONFIG_TYPE:
        raise BadDataError(f"manifest has configuration of type {manifest.config.media_type}")
    if manifest.provenance.media_type != STATEMENT_TYPE:
        raise BadDataError(f"manifest's last layer is {manifest.provenance.media_type}, not {STATEMENT_TYPE}")
    for layer in manifest.layers[:-1]:
        if layer.media_type not in known:
            raise BadDataError(
                f"manifest has a layer of type {layer.media_type}, not one of ModelPack's raw ones"
            )
    if manifest.annotations.content != content_digest(manifest.annotations.kind, manifest.files):
        raise IntegrityError("manifest's content digest does not fit its files")


def to_artifact(manifest: Manifest, digest: str) -> Artifact:
    """Return what the rest of the program sees of a manifest.

    Raises:
        BadDataError: the facts are no JSON object.
    """
    try:
        facts = json.loads(manifest.annotations.facts)
    except (ValueError, RecursionError) as error:
        raise BadDataError(f"manifest {digest[:19]} has facts that are no JSON") from error
    if not isinstance(facts, dict):
        raise BadDataError(f"manifest {digest[:19]} has facts that are no JSON object")
    files = manifest.files
    return Artifact(
        name=check_name(manifest.annotations.name),
        digest=digest,
        size=sum(file.size for file in files),
        kind=manifest.annotations.kind,
        content=manifest.annotations.content,
        files=files,
        facts=facts,
    )


def _descriptor(kind: str, hexadecimal: str, size: int, annotations: dict[str, str]) -> dict[str, Any]:
    value = {"mediaType": kind, "digest": f"sha256:{hexadecimal}", "size": size}
    return {**value, "annotations": annotations} if annotations else value


def _encode(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, no NaN.

    Raises:
        BadDataError: the value cannot be written as JSON.
    """
    try:
        return json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        ).encode()
    except (TypeError, ValueError) as error:
        raise BadDataError(f"facts and configuration have to be plain JSON values: {error}") from error

"""Where things lie in a store. The one place that knows the layout; see ``docs/store.md``.

blobs/sha256/<hex>              one file's bytes, immutable
manifests/sha256/<hex>          an OCI manifest, immutable
attestations/<manifest>/<hex>   a statement or signature over a manifest
tags/<name>/<tag>               create-only reference
branches/<name>/<inverted seq>  create-only reference; the first key listed is the newest
leases/<uuid>                   a publish in progress: digests it relies on
collections/<uuid>              a collection in progress: digests it is about to delete
probes/<uuid>/<number>          what doctor writes, and removes again
"""

from __future__ import annotations

import re

from tunemill.errors import BadDataError

BLOBS = "blobs/sha256/"
MANIFESTS = "manifests/sha256/"
ATTESTATIONS = "attestations/"
TAGS = "tags/"
BRANCHES = "branches/"
LEASES = "leases/"
COLLECTIONS = "collections/"
PROBES = "probes/"

_LAST = 0xFFFFFFFFFFFFFFFF  # inverted numbers are 16 hex digits, so that they sort as text


def blob(hexadecimal: str) -> str:
    """Key of one file's bytes."""
    return BLOBS + hexadecimal


def manifest(hexadecimal: str) -> str:
    """Key of a manifest."""
    return MANIFESTS + hexadecimal


def attestation(manifest_hexadecimal: str, hexadecimal: str) -> str:
    """Key of a statement or signature over a manifest."""
    return f"{ATTESTATIONS}{manifest_hexadecimal}/{hexadecimal}"


def tag(name: str, tag_name: str) -> str:
    """Key of a tag's reference."""
    return f"{TAGS}{name}/{tag_name}"


def branch(name: str, sequence: int) -> str:
    """Key of the reference with this sequence number; a higher number sorts first."""
    return f"{BRANCHES}{name}/{_LAST - sequence:016x}"


def sequence(key: str) -> int:
    """Return the sequence number in a branch key.

    Raises:
        BadDataError: the key's last segment is not 16 hex digits.
    """
    last = key.rpartition("/")[2]
    if not re.fullmatch(r"[0-9a-f]{16}", last):
        raise BadDataError(f"store key {key} is malformed: expected 16 hex digits after the name")
    return _LAST - int(last, 16)


def lease(identifier: str) -> str:
    """Key of a publish in progress."""
    return LEASES + identifier


def collection(identifier: str) -> str:
    """Key of a collection in progress."""
    return COLLECTIONS + identifier

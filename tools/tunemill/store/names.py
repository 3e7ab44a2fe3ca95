"""Names, tags, references and file paths: what is allowed, and how a reference is read.

Everything that becomes part of a key or of a local path passes through here first, so no name can
climb out of a store and no manifest out of its destination. Names follow the OCI distribution rules
for repository names, because a store can be pushed to a registry as it is; names and tags are lower
case, because a directory store may live on a file system that ignores case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tunemill.errors import BadDataError, UsageError

_PART = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"{_PART}/{_PART}")
_TAG = re.compile(r"[a-z0-9_][a-z0-9._-]{0,127}")
_HEX = re.compile(r"[0-9a-f]{64}")
_SEGMENT = re.compile(r"[A-Za-z0-9._+-]{1,255}")
NAME_LIMIT = 200  # characters; with prefix and tag a key stays far below S3's 1024 bytes
SEGMENT_LIMIT = 8

# Pickles run code when read and archives hide paths from these rules.
REFUSED_SUFFIXES = (
    *(".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"),
    *(".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".7z"),
)


@dataclass(frozen=True)
class Wanted:
    """A parsed reference: ``name``, ``name:tag`` or ``name@sha256:<hex>``."""

    name: str
    tag: str | None = None
    digest: str | None = None
    """``sha256:<hex>`` of a manifest."""


def check_name(name: str) -> str:
    """Return ``name`` when it is ``project/kind`` in lower case.

    Raises:
        UsageError: it is not.
    """
    if len(name) > NAME_LIMIT or not _NAME.fullmatch(name):
        raise UsageError(
            f"'{name[:80]}' is no artifact name: expected project/kind in lower case, "
            "as in base/llama3 or llama3-cap/adapter"
        )
    return name


def check_tag(tag: str) -> str:
    """Return ``tag`` when it is 1 to 128 of ``[a-z0-9._-]`` and starts with neither ``.`` nor ``-``.

    Raises:
        UsageError: it is not.
    """
    if not _TAG.fullmatch(tag):
        raise UsageError(f"'{tag[:80]}' is no tag: expected 1 to 128 of a-z, 0-9, '.', '_' and '-'")
    return tag


def check_digest(digest: str) -> str:
    """Return the 64 hex digits of ``sha256:<hex>``.

    Raises:
        UsageError: it has another form.
    """
    algorithm, _, value = digest.partition(":")
    if algorithm != "sha256" or not _HEX.fullmatch(value):
        raise UsageError(f"expected sha256: and 64 hex digits, got '{digest[:80]}'")
    return value


def parse_reference(text: str) -> Wanted:
    """Read what a user writes: ``name``, ``name:tag`` or ``name@sha256:<hex>``.

    Raises:
        UsageError: a part of it is malformed.
    """
    name, at, digest = text.partition("@")
    if at:
        check_digest(digest)
        return Wanted(check_name(name), digest=digest)
    name, colon, tag = text.partition(":")
    return Wanted(check_name(name), tag=check_tag(tag) if colon else None)


def check_paths(paths: Iterable[str]) -> None:
    """Check the file paths of one artifact against the rules that keep a pull in its destination.

    At most 8 segments of ``[A-Za-z0-9._+-]``, none ``.`` or ``..``; unique when case is ignored; no
    path is also the folder of another; no pickle, no archive.

    Raises:
        BadDataError: naming the first path that breaks a rule, and the rule.
    """
    seen: dict[str, str] = {}
    for path in paths:
        _check_path(path)
        folded = path.casefold()
        if folded in seen:
            raise BadDataError(f"paths '{path}' and '{seen[folded]}' differ in nothing but case")
        seen[folded] = path
    for folded, path in seen.items():
        segments = folded.split("/")
        for depth in range(1, len(segments)):
            if "/".join(segments[:depth]) in seen:
                raise BadDataError(f"path '{path}' lies below another file of the same artifact")


def _check_path(path: str) -> None:
    segments = path.split("/")
    if len(segments) > SEGMENT_LIMIT:
        raise BadDataError(f"path '{path[:120]}' has more than {SEGMENT_LIMIT} segments")
    for segment in segments:
        if segment in (".", "..") or not _SEGMENT.fullmatch(segment):
            raise BadDataError(
                f"path '{path[:120]}' is refused: each segment has to be of A-Z, a-z, 0-9, '.', '_', '+', "
                "'-' and neither '.' nor '..'"
            )
    if path.casefold().endswith(REFUSED_SUFFIXES):
        raise BadDataError(
            f"path '{path}' is refused: pickles and archives are not stored; save weights as safetensors"
        )

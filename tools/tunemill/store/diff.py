"""What differs between two artifacts, and between those they were made from.

Two runs mostly differ far upstream: two reports differ because of one key of the training. So where both
have an input of the same role and the inputs differ, those are compared as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tunemill.store.manifest import Artifact
from tunemill.store.store import Store

Aspect = Literal["kind", "stage", "tool", "config", "input", "file", "fact", "host"]


@dataclass(frozen=True)
class Difference:
    """One value that is not the same; None stands for a value that one side does not have."""

    where: str
    """Roles from the artifacts down, as in ``gguf/merged/adapter``; empty for the artifacts themselves."""
    aspect: Aspect
    key: str
    first: Any
    second: Any


def diff(store: Store, first: str, second: str) -> list[Difference]:
    """Return the differences of two references, the artifacts' own before those of their inputs.

    Raises:
        UsageError: a reference does not exist.
        BadDataError: a manifest or provenance on the way is damaged.
    """
    found: list[Difference] = []
    waiting = [("", store.resolve(first), store.resolve(second))]
    seen: set[tuple[str, str]] = set()
    while waiting:
        where, left, right = waiting.pop(0)
        if left.digest == right.digest or (left.digest, right.digest) in seen:
            continue
        seen.add((left.digest, right.digest))
        found += _compare(store, where, left, right)
        waiting += _common_inputs(store, where, left, right)
    return found


def lines(differences: list[Difference]) -> Iterator[str]:
    """Yield the differences as text, one a line under the artifacts they belong to."""
    where = None
    for difference in differences:
        if difference.where != where:
            where = difference.where
            yield f"{where or 'the artifacts'}:"
        sides = f"{_short(difference.first)} -> {_short(difference.second)}"
        yield f"  {difference.aspect} {difference.key}: {sides}"


def _compare(store: Store, where: str, left: Artifact, right: Artifact) -> Iterator[Difference]:
    before, after = store.provenance(left), store.provenance(right)
    aspects: list[tuple[Aspect, Mapping[str, Any], Mapping[str, Any]]] = [
        ("kind", {"kind": left.kind}, {"kind": right.kind}),
        ("stage", {"stage": before.stage}, {"stage": after.stage}),
        ("tool", _tool(before), _tool(after)),
        ("config", before.config, after.config),
        ("input", before.inputs, after.inputs),
        ("fact", left.facts, right.facts),
        ("file", _files(left), _files(right)),
        ("host", before.host, after.host),
    ]
    for aspect, old, new in aspects:
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key) or (key in old) != (key in new):
                yield Difference(where, aspect, key, old.get(key), new.get(key))


def _common_inputs(
    store: Store, where: str, left: Artifact, right: Artifact
) -> Iterator[tuple[str, Artifact, Artifact]]:
    """Yield inputs of one role on both sides; those not in this store cannot be looked into."""
    old, new = store.provenance(left).inputs, store.provenance(right).inputs
    for role in sorted(old.keys() & new.keys()):
        before, after = store.find(old[role]), store.find(new[role])
        if before is not None and after is not None:
            yield f"{where}/{role}".lstrip("/"), before, after


def _tool(provenance: Any) -> dict[str, str | None]:
    return {
        "tunemill": provenance.tool_version,
        "llama.cpp": provenance.llama_cpp,
        "image": provenance.image,
    }


def _files(artifact: Artifact) -> dict[str, str]:
    return {file.path: f"{file.size} bytes, sha256 {file.digest[:12]}" for file in artifact.files}


def _short(value: Any) -> str:
    text = "(absent)" if value is None else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."

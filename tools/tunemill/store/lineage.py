"""Lineage: how an artifact came to be, walked back through its inputs to base weights and data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tunemill.store.manifest import Artifact
from tunemill.store.store import Store


@dataclass(frozen=True)
class Origin:
    """One artifact in a lineage."""

    role: str
    """What it was to the stage that read it; empty for the artifact asked for."""
    reference: str
    """``name@sha256:<hex>``."""
    kind: str | None
    """None for an input that is not in this store; then nothing below is known either."""
    stage: str | None
    tool_version: str | None
    finished: datetime | None
    image: str | None
    """``name@sha256:<hex>`` of the container image it was made in; None outside of containers."""
    overridden: bool
    """It was published though it differs from its input by more than its limits allow."""
    inputs: tuple[Origin, ...]
    repeated: bool = False
    """It stands above already, with its inputs."""

    def as_json(self) -> dict[str, Any]:
        """Return the tree as plain JSON values."""
        return {
            "role": self.role,
            "reference": self.reference,
            "kind": self.kind,
            "stage": self.stage,
            "tool_version": self.tool_version,
            "finished": self.finished.isoformat() if self.finished else None,
            "image": self.image,
            "published_against_parity": self.overridden,
            "repeated": self.repeated,
            "inputs": [origin.as_json() for origin in self.inputs],
        }


def lineage(store: Store, reference: str) -> Origin:
    """Return the tree of an artifact and all it was made from; each artifact's inputs appear once.

    Raises:
        UsageError: the reference does not exist.
        BadDataError: a manifest or provenance on the way is damaged.
    """
    return _origin(store, "", store.resolve(reference), set())


def ancestors(store: Store, artifact: Artifact) -> list[dict[str, Any]]:
    """Return an artifact and all it was made from as plain JSON values, each once, after its own inputs.

    An input that is not in this store has its reference alone, the other values being None or empty.

    Raises:
        BadDataError: a manifest or provenance on the way is damaged.
    """
    found: dict[str, dict[str, Any]] = {}
    _gather(store, artifact, found)
    return list(found.values())


def _gather(store: Store, artifact: Artifact, found: dict[str, dict[str, Any]]) -> None:
    made = store.provenance(artifact)
    for _, reference in sorted(made.inputs.items()):
        if reference in found:
            continue
        below = store.find(reference)
        if below is None:
            found[reference] = {"reference": reference, "stage": None}
        else:
            _gather(store, below, found)
    found[artifact.reference] = {
        "reference": artifact.reference,
        "kind": artifact.kind,
        "stage": made.stage,
        "tool_version": made.tool_version,
        "finished": made.finished.isoformat(timespec="seconds"),
        "image": made.image,
        "llama_cpp": made.llama_cpp,
        "published_against_parity": _overridden(artifact),
        "inputs": dict(made.inputs),
        "settings": {key: value for key, value in made.config.items() if made.origins.get(key) != "default"},
    }


def lines(origin: Origin) -> Iterator[str]:
    """Yield a tree as text, one artifact a line: role, reference, stage, version, date, image."""
    yield _line(origin)
    yield from _branches(origin, "")


def _branches(origin: Origin, indent: str) -> Iterator[str]:
    for number, child in enumerate(origin.inputs, 1):
        last = number == len(origin.inputs)
        yield f"{indent}{'└─' if last else '├─'} {_line(child)}"
        yield from _branches(child, indent + ("   " if last else "│  "))


def _line(origin: Origin) -> str:
    role = f"{origin.role}: " if origin.role else ""
    name, _, digest = origin.reference.partition("@")
    short = f"{role}{name}@{digest[:19]}"
    if origin.stage is None or origin.finished is None:
        return f"{short}  not in this store"
    if origin.repeated:
        return f"{short}  (above)"
    made = f"{short}  {origin.stage} {origin.tool_version}, {origin.finished:%Y-%m-%d %H:%M:%S}Z"
    made += f" in {_short_image(origin.image)}" if origin.image else ""
    return f"{made}, published against its parity check" if origin.overridden else made


def _short_image(image: str) -> str:
    name, _, digest = image.partition("@")
    return f"{name}@{digest[:19]}" if digest else name


def _origin(store: Store, role: str, artifact: Artifact, seen: set[str]) -> Origin:
    made = store.provenance(artifact)
    repeated = artifact.digest in seen
    seen.add(artifact.digest)
    inputs = () if repeated else tuple(_inputs(store, made.inputs.items(), seen))
    return Origin(
        role,
        artifact.reference,
        artifact.kind,
        made.stage,
        made.tool_version,
        made.finished,
        made.image,
        _overridden(artifact),
        inputs,
        repeated,
    )


def _overridden(artifact: Artifact) -> bool:
    parity = artifact.facts.get("parity")
    return isinstance(parity, dict) and parity.get("verdict") == "overridden"


def _inputs(store: Store, inputs: Any, seen: set[str]) -> Iterator[Origin]:
    for role, reference in sorted(inputs):
        artifact = store.find(reference)
        if artifact is None:
            yield Origin(role, reference, None, None, None, None, None, False, ())
        else:
            yield _origin(store, role, artifact, seen)

"""Predictions of a store as the commands compare them: pulled, read, and with all that they come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tunemill.errors import UsageError
from tunemill.progress import Progress
from tunemill.store import Artifact, Store

if TYPE_CHECKING:
    from tunemill.evaluate.predictions import Predictions


@dataclass(frozen=True)
class Answers:
    """One set of predictions in a store."""

    artifact: Artifact
    predictions: Predictions
    provenance: dict[str, Any]
    """Role, reference, content, facts and ancestors, as a report shows them."""


def read_answers(store: Store, artifact: Artifact) -> Answers:
    """Pull and read predictions.

    Raises:
        BadDataError: they are malformed, or a row cannot be judged.
    """
    from tunemill.evaluate.predictions import read_predictions
    from tunemill.store.lineage import ancestors

    with _pulled(store, artifact) as folder:
        predictions = read_predictions(folder)
    told = {
        "role": "predictions",
        "reference": artifact.reference,
        "content": artifact.content,
        "facts": dict(artifact.facts),
        "ancestors": ancestors(store, artifact),
    }
    return Answers(artifact, predictions, told)


def find_answers(store: Store, reference: str) -> Artifact:
    """Return the predictions that a reference names, or that the report it names has judged.

    Raises:
        UsageError: it is neither, or does not exist.
    """
    artifact = store.resolve(reference)
    if artifact.kind == "report":
        artifact = store.resolve(store.provenance(artifact).inputs["predictions"])
    if artifact.kind != "predictions":
        raise UsageError(f"{artifact.reference} is {artifact.kind}, expected predictions or a report")
    return artifact


def read_groups(store: Store, answers: Answers) -> Any:
    """Return ``(rows,)`` numbers of the near-duplicate groups of the data that were answered.

    Texts are groups of their own where the data are not in this store.

    Raises:
        BadDataError: a data file is damaged.
    """
    from tunemill.evaluate.bootstrap import clusters_of
    from tunemill.evaluate.evaluate import read_clusters

    data = _data_of(store, answers.artifact)
    if data is None:
        return clusters_of(answers.predictions.items or answers.predictions.ids)
    with _pulled(store, data) as folder:
        return read_clusters(folder, answers.predictions)


def _data_of(store: Store, artifact: Artifact) -> Artifact | None:
    """Return the data of predictions; joined ones have them from their shards."""
    inputs = store.provenance(artifact).inputs
    if "data" in inputs:
        return store.find(inputs["data"])
    below = _existing(store, list(inputs.values()))
    return _data_of(store, below[0]) if below else None


def _existing(store: Store, references: Sequence[str]) -> list[Artifact]:
    found = (store.find(reference) for reference in references)
    return [artifact for artifact in found if artifact is not None]


@contextmanager
def _pulled(store: Store, artifact: Artifact) -> Iterator[Path]:
    with TemporaryDirectory(prefix="tunemill-") as scratch:
        folder = Path(scratch, "files")
        store.pull(artifact, folder, Progress(quiet=True))
        yield folder

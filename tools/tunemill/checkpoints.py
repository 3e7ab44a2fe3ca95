"""Saved states of one action, as artifacts in the store.

A checkpoint is published like anything else, so it is visible whole or not at all, and a run killed on
one node goes on from it on another. Its name holds the action key: a state is never resumed under
another configuration or other inputs. Old ones are collected by ``tunemill store gc``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from tunemill.errors import BadDataError
from tunemill.group import Alone, Group, share
from tunemill.progress import Progress
from tunemill.store import Draft, Provenance, Store

NAME_DIGITS = 16  # hex digits of the action key in a checkpoint's name
KIND = "checkpoint"


def checkpoint_name(run: str, key: str) -> str:
    """Return the name that an action's checkpoints have."""
    return f"{run.lower()}/checkpoint-{key[:NAME_DIGITS]}"


@dataclass(frozen=True)
class StoredCheckpoints:
    """Checkpoints of one action in one store."""

    store: Store
    name: str
    provenance: Provenance
    """Of the action; times are filled in for each checkpoint."""
    progress: Progress
    group: Group = field(default_factory=Alone)
    """The processes that resume together."""

    def latest(self, destination: Path) -> int | None:
        """Pull the newest saved state into ``destination`` and return its step, or None.

        Which one is the newest is what process 0 of a group finds, for all of them.

        Raises:
            BadDataError: what has the name is no checkpoint.
        """
        artifact = share(self.group, self.store.find(self.name) if self.group.rank == 0 else None)
        if artifact is None:
            return None
        step = artifact.facts.get("step")
        if artifact.kind != KIND or not isinstance(step, int):
            raise BadDataError(f"{artifact.reference} is no checkpoint: it records no step")
        self.store.pull(artifact, destination, self.progress)
        self.progress.say(f"going on from step {step}: {artifact.reference}")
        return step

    def save(self, directory: Path, step: int) -> None:
        """Publish the files of ``directory`` as the state after ``step`` steps; one process does."""
        provenance = replace(self.provenance, finished=datetime.now(UTC))
        self.store.publish(Draft(self.name, KIND, directory, {"step": step}, provenance), self.progress)

"""What a stage is, and all that its work may see.

A stage's work is a function from local input directories and a frozen configuration to files
in an empty output directory, plus facts. It knows neither the store nor the command line;
``stage.py`` runs it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from tunemill.group import Alone, Group
from tunemill.progress import Progress

Facts = dict[str, Any]
"""JSON-able findings of a stage, kept in the artifact's provenance and shown to later stages."""


class StageConfig(BaseModel):
    """Base of every stage's configuration: frozen, typed, unknown keys refused.

    A field declared with ``json_schema_extra={"identity": False}`` changes how a stage runs
    (threads, devices) but not its result, and so is left out of the action key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def naming(self) -> dict[str, str]:
        """Return what the artifacts' names are made of besides the fields."""
        return {}


ConfigT = TypeVar("ConfigT", bound=StageConfig)


@dataclass(frozen=True)
class Input:
    """One input artifact, pulled and verified."""

    reference: str
    """``name@sha256:<hex>`` of the manifest."""
    content: str
    """sha256 over the artifact's files alone: equal bytes, equal content."""
    kind: str
    path: Path
    """Directory of the artifact's files; read-only."""
    facts: Mapping[str, Any]
    """What the stage that made it found out."""
    bound_to: str | None = None
    """The class of host it is trusted on; None where it is trusted on all."""
    ancestors: tuple[Mapping[str, Any], ...] = ()
    """All it was made from and itself, oldest first, as ``store.lineage.ancestors`` tells them; only for
    stages that say where things come from."""


class Checkpoints(Protocol):
    """Saved states of one action: each is visible whole or not at all."""

    def latest(self, destination: Path) -> int | None:
        """Put the newest saved state into ``destination`` and return its step, or None."""

    def save(self, directory: Path, step: int) -> None:
        """Publish the files of ``directory`` as the state after ``step`` steps."""


@dataclass(frozen=True)
class Work(Generic[ConfigT]):
    """Everything a stage's work is given."""

    config: ConfigT
    inputs: Mapping[str, Input]
    output: Path
    """Empty directory; what is in it when the work returns is published."""
    scratch: Path
    """Private directory that survives a kill: the same action gets the same one again."""
    progress: Progress
    checkpoints: Checkpoints
    stop: threading.Event = field(default_factory=threading.Event)
    """Set on SIGTERM or Ctrl-C; a stage with ``stops_itself`` saves and raises ``Stopped``."""
    group: Group = field(default_factory=Alone)
    """The processes that do this work together; only the output of process 0 is published."""


@dataclass(frozen=True)
class Stage(Generic[ConfigT]):
    """The declaration of one stage. Functions are named as ``module:function`` so that a
    command's ``--help`` imports none of them.
    """

    name: str
    summary: str
    config: type[ConfigT]
    inputs: Mapping[str, str]
    """Role to default reference, a template over the resolved recipe: ``{run}/adapter``."""
    output: str
    """Name of the output artifact, a template as above."""
    kind: str
    work: str
    """``module:function`` of ``(Work) -> Facts``."""
    check: str | None = None
    """``module:function`` of ``(config) -> None``, run before any input is pulled."""
    reads: str | None = None
    """``module:function`` of ``(config) -> Mapping[str, str]``: digests of what the work reads
    that is no artifact (local files, this Python's library); part of the action key."""
    before: str | None = None
    """``module:function`` of ``(Work) -> Facts``, run once by process 0 when the inputs are there, before the
    work: what another stage knows would come to nothing later."""
    binds_host: bool = False
    """The output is trusted only on the host class that made it."""
    bound_inputs: tuple[str, ...] = ()
    """Roles whose artifacts, where they are bound to another class of host than this one, are refused
    unless the configuration's ``reprove`` says that the work proves them itself."""
    stops_itself: bool = False
    """The work watches ``Work.stop`` and saves its state before it ends."""
    group: str | None = None
    """``module:function`` of ``(config) -> context of a Group``: how the processes that torchrun
    starts meet; without it the work is done by one."""
    tells_origins: bool = False
    """The work is given the ancestors of its inputs."""
    other_inputs: str | None = None
    """``module:function`` of ``(config) -> Mapping[str, str] | None``: what is read instead of
    ``inputs`` under a configuration that has the stage do something else."""

    def templates(self, config: ConfigT) -> dict[str, str]:
        """Return every role with its default reference."""
        other = self.load(self.other_inputs)(config) if self.other_inputs else None
        return dict(self.inputs if other is None else other)

    def load(self, name: str) -> Any:
        """Import and return the function named by ``module:function``."""
        module, function = name.split(":")
        return getattr(import_module(module), function)

"""The one way to run a stage: resolve, look for the output, pull, work, publish.

``plan`` decides without changing anything; ``execute`` does it. An action that has an output is not run
again. Killed at any moment, nothing half-done is visible, and the same action finds its scratch again.

Of several processes that torchrun started, each works on its own part; process 0 decides what is done
and publishes it, and the first process of each machine pulls the inputs for all that are there.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout

from tunemill import __version__
from tunemill.action import action_key, action_tag, resolved
from tunemill.checkpoints import StoredCheckpoints, checkpoint_name
from tunemill.errors import ConfigurationError, ConflictError, UsageError
from tunemill.files import disk_errors
from tunemill.group import Alone, Group, share, started_by_torchrun
from tunemill.host import Host, this_host
from tunemill.progress import Progress
from tunemill.recipe import Recipe
from tunemill.signals import Signals
from tunemill.stages import LISTED, load_stage
from tunemill.store import Artifact, Draft, Provenance, Store
from tunemill.store.lineage import ancestors
from tunemill.store.pull import cache_directory, cache_errors
from tunemill.work import Facts, Input, Stage, StageConfig, Work

log = logging.getLogger("tunemill")


@dataclass(frozen=True)
class Plan:
    """What running a stage would take and give."""

    stage: Stage[Any]
    recipe: Recipe
    config: StageConfig
    output: str
    """Name of the output."""
    inputs: Mapping[str, Artifact]
    missing: Mapping[str, str]
    """Role to what is wrong, of inputs that do not exist (yet)."""
    reads: Mapping[str, str]
    """Digests of what the work reads that is no artifact."""
    host: Host
    bound: Mapping[str, str]
    """Role to the class of host that an input is trusted on, of ``bound_inputs`` that are bound to one."""
    key: str | None
    """Action key; None while inputs are missing."""
    existing: Artifact | None
    """The output, when an equal action has made it."""

    @property
    def foreign(self) -> Mapping[str, str]:
        """Those of ``bound`` that another class of host than this one made."""
        return {role: there for role, there in self.bound.items() if there != self.host.host_class}

    def settings(self) -> list[tuple[str, Any, str]]:
        """Return key, value and origin of the whole configuration."""
        return [(key, value, self.recipe.origin(key)) for key, value in resolved(self.config).items()]


@dataclass(frozen=True)
class Outcome:
    """What came of a stage."""

    plan: Plan
    artifact: Artifact
    reused: bool
    seconds: float

    def record(self) -> dict[str, Any]:
        """Return it as plain JSON values: the line that ``--json`` prints."""
        return {
            "stage": self.plan.stage.name,
            "reference": self.artifact.reference,
            "name": self.artifact.name,
            "digest": self.artifact.digest,
            "content": self.artifact.content,
            "kind": self.artifact.kind,
            "size": self.artifact.size,
            "reused": self.reused,
            "seconds": round(self.seconds, 3),
            "action_key": self.plan.key,
            "inputs": {role: artifact.reference for role, artifact in self.plan.inputs.items()},
            "facts": dict(self.artifact.facts),
        }


# Which stage makes which kind, for the hint when an input is missing.
MAKERS = {
    "base": "fetch",
    "data": "prepare",
    "adapter": "train",
    "merged": "merge",
    "gguf": "convert",
    "imatrix": "imatrix",
    "gptq": "gptq",
    "predictions": "infer",
    "report": "evaluate",
}


def plan(store: Store, stage: Stage[Any], recipe: Recipe, chosen: Mapping[str, str]) -> Plan:
    """Resolve configuration and inputs, and look whether the output exists.

    ``chosen`` maps roles to references that replace the defaults.

    Raises:
        UsageError: the configuration is wrong, or ``chosen`` names an unknown role.
    """
    config = recipe.configure(stage)
    templates = stage.templates(config)
    if unknown := sorted(set(chosen) - set(templates)):
        takes = ", ".join(templates) or "none"
        raise UsageError(f"{stage.name} has no input '{unknown[0]}'; its inputs: {takes}")
    output = recipe.format(stage.output, config)
    references = {
        role: chosen[role] if role in chosen else recipe.format(template, config)
        for role, template in templates.items()
    }
    inputs, missing = _find_inputs(store, stage, references, templates)
    host = this_host()
    if missing:
        return Plan(stage, recipe, config, output, inputs, missing, {}, host, {}, None, None)
    reads = stage.load(stage.reads)(config) if stage.reads else {}
    key = _key(stage, config, inputs, reads, host)
    existing = store.find(f"{output}:{action_tag(key)}")
    bound = _bound(store, stage, inputs)
    return Plan(stage, recipe, config, output, inputs, missing, reads, host, bound, key, existing)


def check(planned: Plan) -> None:
    """Run the stage's own check of its configuration, unless the output exists already.

    Raises:
        TunemillError: what the stage finds wrong.
    """
    if planned.existing is None and planned.stage.check:
        planned.stage.load(planned.stage.check)(planned.config)


def refuse_foreign(planned: Plan) -> None:
    """See that every input is trusted on this host, or is going to be proved, unless the output exists.

    Raises:
        ConfigurationError: naming both classes of host and what can be done.
    """
    if planned.existing is not None or getattr(planned.config, "reprove", False):
        return
    for role, there in planned.foreign.items():
        raise ConfigurationError(
            f"{planned.inputs[role].reference} was made on another kind of host ({there}) than this one "
            f"({planned.host.host_class}): --requantize makes it here from what it was made from, --reprove "
            "proves it here by its probe set"
        )


def execute(store: Store, planned: Plan, progress: Progress, signals: Signals) -> Outcome:
    """Make the output, or take the one that exists, and make it the newest of its name.

    Raises:
        UsageError: an input does not exist.
        TunemillError: what the check or the work finds wrong; nothing became visible.
    """
    started = time.monotonic()
    with _group(planned) as group:
        planned = _agree(planned, group)
        if planned.existing is not None:
            return _reuse(store, planned, planned.existing, started, group)
        check(planned)
        if planned.key is None:
            raise UsageError("; ".join(planned.missing.values()))
        refuse_foreign(planned)
        folder = _folder(planned.key, group)
        with _alone(folder) if group.local_rank == 0 else nullcontext():
            made_meanwhile = share(group, store.find(_tagged(planned)) if group.rank == 0 else None)
            if made_meanwhile is not None:
                return _reuse(store, planned, made_meanwhile, started, group)
            artifact = _make(store, planned, folder, progress, signals, group)
    return Outcome(planned, artifact, False, time.monotonic() - started)


@contextmanager
def rehearse(store: Store, planned: Plan, progress: Progress) -> Iterator[Work[Any]]:
    """Yield a stage's work with its inputs, in directories of its own; nothing is kept or published."""
    cache_directory().mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache_directory()) as folder:
        work = _prepare(store, planned, Path(folder), progress, Alone(), _provenance(planned))
        _pull(store, planned, Path(folder) / "inputs", progress)
        yield work


@contextmanager
def _group(planned: Plan) -> Iterator[Group]:
    """Meet the other processes that torchrun started; without it there are none.

    Raises:
        UsageError: the stage is one process's work.
    """
    if not started_by_torchrun():
        yield Alone()
        return
    stage = planned.stage
    if stage.group is None:
        raise UsageError(f"{stage.name} runs in one process: start it without torchrun")
    with stage.load(stage.group)(planned.config) as group:
        yield group


def _agree(planned: Plan, group: Group) -> Plan:
    """Return process 0's plan: what another finds may have been published a moment later.

    Raises:
        UsageError: the processes were started with different settings.
    """
    if group.size == 1:
        return planned
    found = {role: getattr(planned, role) for role in ("inputs", "missing", "reads", "key", "existing")}
    agreed = replace(planned, **share(group, found))
    key = agreed.key and _key(agreed.stage, agreed.config, agreed.inputs, agreed.reads, agreed.host)
    if len(set(group.gather((agreed.output, key)))) > 1:
        raise UsageError(
            f"the {group.size} processes of {planned.stage.name} were started with different settings or "
            "versions: give all nodes the same image, command and recipes"
        )
    return agreed


def _reuse(store: Store, planned: Plan, existing: Artifact, started: float, group: Group) -> Outcome:
    log.info("%s: reusing %s", planned.stage.name, existing.reference)
    if group.rank == 0:
        store.advance(existing)
    return Outcome(planned, existing, True, time.monotonic() - started)


def _make(
    store: Store, planned: Plan, folder: Path, progress: Progress, signals: Signals, group: Group
) -> Artifact:
    provenance = _provenance(planned)
    stage, finished = planned.stage, False
    try:
        work = replace(_prepare(store, planned, folder, progress, group, provenance), stop=signals.stop)
        if group.local_rank == 0:
            _pull(store, planned, folder / "inputs", progress)
        before = stage.load(stage.before)(work) if stage.before and group.rank == 0 else {}
        group.gather(None)  # now every machine has them
        log.info("%s: running for %s", stage.name, planned.output)
        with disk_errors(folder), signals.saved_by_work() if stage.stops_itself else nullcontext():
            facts = before | stage.load(stage.work)(work)
        made = None
        if group.rank == 0:
            made = _publish(store, planned, work.output, facts, provenance, progress)
        _discard(work.scratch, work.output)
        artifact: Artifact = share(group, made)
        finished = True
        return artifact
    finally:
        # Where others still run on this machine, what they read stays; the next run discards it.
        if group.local_rank == 0 and (finished or group.size == 1):
            _tidy(folder)


def _prepare(
    store: Store, planned: Plan, folder: Path, progress: Progress, group: Group, provenance: Provenance
) -> Work[Any]:
    """Make this process's directories, and return its work, whose inputs are still to be pulled."""
    own = f"-{group.rank}" if group.rank else ""
    output, scratch = folder / f"output{own}", folder / f"scratch{own}"
    name = checkpoint_name(planned.output.partition("/")[0], provenance.action_key)
    with disk_errors(folder):
        _discard(output, *([folder / "inputs"] if group.local_rank == 0 else []))
        for directory in (output, scratch):
            directory.mkdir(parents=True, exist_ok=True)
    return Work(
        config=planned.config,
        inputs={
            role: Input(
                artifact.reference,
                artifact.content,
                artifact.kind,
                folder / "inputs" / role,
                artifact.facts,
                planned.bound.get(role),
                tuple(ancestors(store, artifact)) if planned.stage.tells_origins else (),
            )
            for role, artifact in planned.inputs.items()
        },
        output=output,
        scratch=scratch,
        progress=progress,
        checkpoints=StoredCheckpoints(store, name, provenance, progress, group),
        group=group,
    )


def _folder(key: str, group: Group) -> Path:
    """Return where an action is worked on: in one place for each machine, even if they share a disk."""
    first_here = group.rank - group.local_rank
    return cache_directory() / "work" / (f"{key}-{first_here}" if first_here else key)


def _publish(
    store: Store, planned: Plan, output: Path, facts: Facts, provenance: Provenance, progress: Progress
) -> Artifact:
    finished = replace(
        provenance,
        finished=datetime.now(UTC),
        llama_cpp=facts.get("llama_cpp", provenance.llama_cpp),
    )
    tag = action_tag(provenance.action_key)
    draft = Draft(planned.output, planned.stage.kind, output, facts, finished, (tag,))
    try:
        return store.publish(draft, progress)
    except ConflictError:
        winner = store.find(_tagged(planned))
        if winner is None:
            raise
        log.warning("%s: another run of the same action was first; its output is used", planned.stage.name)
        store.advance(winner)
        return winner


def _provenance(planned: Plan) -> Provenance:
    """Return how the output comes to be, as far as it is known before the work."""
    config = resolved(planned.config)
    now = datetime.now(UTC)
    return Provenance(
        stage=planned.stage.name,
        tool_version=__version__,
        config={**config, **({"reads": dict(planned.reads)} if planned.reads else {})},
        origins={key: planned.recipe.origin(key) for key in config},
        inputs={role: artifact.reference for role, artifact in planned.inputs.items()},
        host=planned.host.record(),
        action_key=planned.key or "",
        image=os.environ.get("TUNEMILL_IMAGE"),
        llama_cpp=planned.host.llama_cpp if planned.stage.binds_host else None,
        started=now,
        finished=now,
    )


def _key(
    stage: Stage[Any],
    config: StageConfig,
    inputs: Mapping[str, Artifact],
    reads: Mapping[str, str],
    host: Host,
) -> str:
    contents = {role: artifact.content for role, artifact in inputs.items()}
    return action_key(stage, config, contents, reads, host)


def _find_inputs(
    store: Store, stage: Stage[Any], references: Mapping[str, str], templates: Mapping[str, str]
) -> tuple[dict[str, Artifact], dict[str, str]]:
    found: dict[str, Artifact] = {}
    missing: dict[str, str] = {}
    for role, reference in references.items():
        try:
            found[role] = store.resolve(reference)
        except UsageError as error:
            missing[role] = f"{stage.name} needs {role}: {error}{_remedy(templates[role])}"
    for role, artifact in found.items():
        wanted = _kind(templates[role])  # a base is a whole model too, as its GGUF for a LoRA needs
        if artifact.kind != wanted and not (wanted == "merged" and artifact.kind == "base"):
            raise UsageError(f"--input {role}: {artifact.reference} is {artifact.kind}, expected {wanted}")
    return found, missing


def _bound(store: Store, stage: Stage[Any], inputs: Mapping[str, Artifact]) -> dict[str, str]:
    """Return which inputs that a stage trusts by their host are bound to which class of it."""
    found = {}
    for role in stage.bound_inputs:
        if role not in inputs:
            continue
        made = store.provenance(inputs[role])
        if made.stage in LISTED and load_stage(made.stage).binds_host and made.host.get("host_class"):
            found[role] = str(made.host["host_class"])
    return found


def _kind(template: str) -> str:
    """Return what kind a default reference is of: names end in their kind, but for ``base/MODEL``."""
    project, _, last = template.partition("/")
    return "base" if project == "base" else last.partition("-")[0]


def _remedy(template: str) -> str:
    kind = _kind(template)
    maker = "quantize" if "{quant}" in template and kind == "gguf" else MAKERS[kind]
    return f" (to make it: tunemill {maker})"


def _tagged(planned: Plan) -> str:
    return f"{planned.output}:{action_tag(planned.key or '')}"


def _pull(store: Store, planned: Plan, folder: Path, progress: Progress) -> None:
    for role, artifact in planned.inputs.items():
        store.pull(artifact, folder / role, progress)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time make an action's output on this machine; the others wait.

    Raises:
        ConfigurationError: the cache cannot be written to.
    """
    with cache_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        with cache_errors(folder.parent):
            lock.acquire(timeout=0)
    except Timeout:
        log.info("another process is making the same; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _tidy(folder: Path) -> None:
    """Leave of a work directory only what a rerun can use."""
    _discard(folder / "inputs", folder / "output")
    scratch = folder / "scratch"
    if scratch.exists() and any(scratch.iterdir()):
        return
    _discard(folder)


def _discard(*folders: Path) -> None:
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)

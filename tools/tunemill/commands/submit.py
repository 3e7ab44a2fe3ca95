"""``tunemill submit``: a stage, or all of them, in a Kubernetes cluster."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tunemill import options
from tunemill.errors import DeniedError, Interrupted, TransientError, UsageError
from tunemill.progress import Progress
from tunemill.signals import SignalReceived, Signals
from tunemill.stages import LISTED

if TYPE_CHECKING:
    from tunemill.kube.api import Api, Json
    from tunemill.kube.request import Prepared, Wish
    from tunemill.kube.settings import Cluster
    from tunemill.recipe import Choice
    from tunemill.store import Store

PIPELINE = "pipeline"
WEEK = 604800  # seconds, for a stage without a deadline of its own


@dataclass(frozen=True)
class Flags:
    """How to submit."""

    detach: bool
    dry_run: bool
    as_json: bool
    in_cluster: bool


@dataclass(frozen=True)
class Place:
    """Where to submit."""

    cluster: Cluster
    store: Store | None
    """As far as it is seen from here."""


@click.command(
    epilog="\b\nExamples:\n  tunemill submit train --model tiny --task stdlib\n"
    "  tunemill submit pipeline --model tiny --task stdlib --quant F16,Q4_K_M --in-cluster"
)
@click.argument("stage", type=click.Choice([*LISTED, PIPELINE]), metavar="STAGE|pipeline")
@options.recipe
@options.inputs
@click.option(
    "--quant",
    "quants",
    metavar="TYPES",
    multiple=True,
    help="For pipeline: quantizations to make and judge.  [default: Q4_K_M]",
)
@click.option(
    "--gpus",
    type=click.IntRange(min=0),
    metavar="N",
    help="GPUs of the pod.  [default: 1 for train and infer where there are any]",
)
@click.option(
    "--nodes",
    type=click.IntRange(min=1),
    metavar="N",
    help="For train: pods that train together, each with its GPUs.  [default: 1]",
)
@click.option(
    "--memory",
    metavar="QUANTITY",
    help="Memory of the pod, such as 32Gi.  [default: by the stage and its inputs]",
)
@click.option(
    "--shards",
    type=click.IntRange(min=2),
    metavar="N",
    help="For infer: pods that share the rows, joined at the end.",
)
@click.option(
    "--store",
    "store_url",
    metavar="URL",
    help="The store as this machine reaches it.  [default: that of cluster.yaml]",
)
@options.cluster
@click.option("--detach", is_flag=True, help="Print the Job's name and return, without following it.")
@click.option(
    "--in-cluster", is_flag=True, help="For pipeline: let a small Job in the cluster run the stages in order."
)
@click.option("--driver", metavar="FILE", hidden=True, help="Run the Jobs of FILE: for --in-cluster's pod.")
@options.dry_run
@options.json
@click.pass_obj
def submit(
    signals: Signals,
    /,
    stage: str,
    inputs: Sequence[str],
    quants: Sequence[str],
    gpus: int | None,
    nodes: int | None,
    memory: str | None,
    shards: int | None,
    store_url: str | None,
    cluster_file: str | None,
    driver: str | None,
    recipe_file: str | None,
    detach: bool,
    in_cluster: bool,
    dry_run: bool,
    as_json: bool,
    **choice: Any,
) -> int:
    """Run a stage or the pipeline as Jobs in a Kubernetes cluster, and follow them.

    Prints the reference of the output, and ends with the stage's own exit code. The same work is submitted
    once: its Job is found by its name, and an output that exists is reused. Ctrl-C detaches; the Job goes on.
    """
    from tunemill.kube.request import Wish, see_store
    from tunemill.kube.settings import find_cluster_file, read_cluster
    from tunemill.recipe import Choice, resolve
    from tunemill.stages import known_keys

    if driver:
        return _drive(Path(driver))
    flags = Flags(detach, dry_run, as_json, in_cluster)
    _check_usage(stage, inputs, quants, shards, flags)
    if nodes and stage not in ("train", PIPELINE):
        raise UsageError(f"--nodes is for train: {stage} runs in one pod, and infer shares rows by --shards")
    given = Choice(file=recipe_file, **choice)
    wish = Wish(
        stage, given, resolve(given, known_keys()), _inputs(inputs), gpus, memory, shards, nodes=nodes
    )
    wishes = list(_stages_of(wish, quants)) if stage == PIPELINE else [wish]
    for one in wishes:
        _configure(one)  # what is wrong with the last stage is said now
    cluster = read_cluster(find_cluster_file(cluster_file))
    place = Place(cluster, see_store(cluster, store_url))
    if in_cluster:
        return _submit_driver(place, wishes, flags)
    return _submit_all(place, wishes, flags)


def _check_usage(
    stage: str, inputs: Sequence[str], quants: Sequence[str], shards: int | None, flags: Flags
) -> None:
    if shards and stage not in ("infer", PIPELINE):
        raise UsageError(f"--shards is for infer, whose rows can be shared; {stage} runs in one pod")
    if stage == PIPELINE:
        if inputs:
            raise UsageError(
                "--input belongs to one stage: the pipeline's stages take what the one before made"
            )
        if flags.detach and not flags.in_cluster:
            raise UsageError("--detach leaves nobody to start the next stage: add --in-cluster")
        return
    if quants:
        raise UsageError(f"--quant is for pipeline: for {stage} it is --set quant=TYPE")
    if flags.in_cluster:
        raise UsageError("--in-cluster is for pipeline: a single stage runs in the cluster by itself")


def _inputs(given: Sequence[str]) -> dict[str, str]:
    from tunemill.commands.stages import parse_inputs

    return parse_inputs(given)


def _configure(wish: Wish) -> None:
    from tunemill.stages import load_stage

    wish.recipe.configure(load_stage(wish.stage))


def _stages_of(wish: Wish, quants: Sequence[str]) -> Iterator[Wish]:
    from tunemill.commands.pipeline import lay_out, split_quants

    for step in lay_out(wish.recipe, split_quants(quants or ("Q4_K_M",))):
        choice = wish.choice if step.quant is None else _with_quant(wish.choice, step.quant)
        shards = wish.shards if step.stage == "infer" else None
        nodes = wish.nodes if step.stage == "train" else None
        yield replace(wish, stage=step.stage, choice=choice, recipe=step.recipe, shards=shards, nodes=nodes)


def _with_quant(choice: Choice, quant: str) -> Choice:
    return replace(choice, settings=(*choice.settings, f"quant={quant}"))


def _submit_all(place: Place, wishes: Sequence[Wish], flags: Flags) -> int:
    """Submit one stage after the other; stop at the first that fails."""
    records: list[dict[str, Any]] = []
    for wish in wishes:
        for step in _shared_out(place, wish):
            record = _submit_step(place, step, flags, alone=len(wishes) == 1)
            records.append(record)
            if record["exit_code"] or (flags.detach and record["job"]):
                if step.shards and not step.joins and not record["exit_code"]:
                    _say("once it has ended, the same command joins the shards")
                _print(records, flags)
                return int(record["exit_code"])
            if record["reused"]:
                break  # what exists undivided need not be joined
    _print(records, flags)
    return 0


def _submit_step(place: Place, wish: Wish, flags: Flags, alone: bool) -> dict[str, Any]:
    """Submit one Job unless its output exists, and return what came of it.

    Raises:
        UsageError: an input is missing that no earlier stage makes.
    """
    prepared = _prepare(place, wish)
    if prepared.existing is not None:
        _say(f"{wish.component}: reusing {prepared.existing.reference}")
        return _record(prepared, 0, prepared.existing.reference, reused=True)
    if prepared.missing and alone and not (flags.dry_run and wish.joins):
        raise UsageError("; ".join(prepared.missing))
    api = _connect(place.cluster)
    if flags.dry_run:
        _dry_run(api, place.cluster, prepared)
        return _record(prepared, 0, prepared.request.output, reused=False)
    code, reference = _submit_one(api, place.cluster, prepared, flags)
    return _record(prepared, code, reference, reused=False)


def _submit_one(api: Api, cluster: Cluster, prepared: Prepared, flags: Flags) -> tuple[int, str]:
    """Return the exit code and the output's reference; detached, zero and the Job's name."""
    from tunemill.kube.submit import keep_files, submit

    submitted = submit(api, prepared.job, cluster, _objects(cluster, *_together(prepared.wish)))
    if prepared.files:
        keep_files(api, submitted, submitted.name, prepared.files)
    _say(f"{prepared.wish.component}: {'following' if submitted.found else 'submitted'} {submitted.name}")
    if flags.detach:
        return 0, submitted.name
    return follow_to_the_end(api, submitted.name, cluster)


def follow_to_the_end(api: Api, name: str, cluster: Cluster, logs: bool = True) -> tuple[int, str]:
    """Follow a Job and return its exit code and its output's reference, after a line if it failed.

    Raises:
        Interrupted: Ctrl-C; the Job goes on.
    """
    from tunemill.kube.follow import follow

    try:
        followed = follow(api, name, cluster.gpu.resource if cluster.gpu else "nvidia.com/gpu", logs)
    except SignalReceived:
        raise Interrupted(f"detached; {name} goes on: tunemill logs -f {name}") from None
    except (TransientError, DeniedError) as error:
        raise type(error)(f"{error}; {name} goes on: tunemill logs -f {name}") from error
    if followed.result.code:
        click.echo(f"tunemill: {followed.result.line} (its log: tunemill logs {name})", err=True)
    return followed.result.code, followed.reference


def _submit_driver(place: Place, wishes: Sequence[Wish], flags: Flags) -> int:
    """Submit a Job that creates the stages' Jobs, from the first whose output does not exist."""
    from tunemill.kube.driver import JOBS, STAGE, driver_job, support
    from tunemill.kube.naming import request_key
    from tunemill.kube.render import pick
    from tunemill.kube.submit import keep_files, sealed, submit

    first = [_prepare(place, step) for wish in wishes for step in _shared_out(place, wish)]
    todo = [prepared.wish for prepared in first if prepared.existing is None]
    for prepared in first:
        if prepared.existing:
            _say(f"{prepared.wish.stage}: reusing {prepared.existing.reference}")
    last = first[-1]
    if not todo and last.existing:
        _print([_record(last, 0, last.existing.reference, reused=True)], flags)
        return 0
    key = request_key(STAGE, {}, [prepared.request.key for prepared in first])
    salt = f"{key} {time.time_ns()}"
    steps = [_prepare(place, wish, salt) for wish in todo]
    api = _connect(place.cluster)
    for prepared in steps:
        _check(api, place.cluster, prepared)
    base = _objects(place.cluster, *(name for prepared in steps for name in _together(prepared.wish)))
    deadline = sum(prepared.job["spec"].get("activeDeadlineSeconds", WEEK) for prepared in steps)
    job = driver_job(pick(base, "fetch"), last.request, key, deadline, place.cluster)
    if flags.dry_run:
        api.create(api.jobs, job, dry_run=True)
        _print([_record(prepared, 0, prepared.request.output, reused=False) for prepared in steps], flags)
        return 0
    submitted = submit(api, job, place.cluster, [*base, *support()])
    keep_files(
        api, submitted, submitted.name, {JOBS: json.dumps([sealed(prepared.job) for prepared in steps])}
    )
    for prepared in (prepared for prepared in steps if prepared.files and not submitted.found):
        keep_files(api, submitted, prepared.request.name, prepared.files)
    _say(f"pipeline: {'following' if submitted.found else 'submitted'} {submitted.name}")
    if flags.detach:
        click.echo(submitted.name)
        return 0
    code, reference = follow_to_the_end(api, submitted.name, place.cluster)
    if not code:
        click.echo(reference)
    return code


def _drive(path: Path) -> int:
    from tunemill.kube.api import connect
    from tunemill.kube.driver import drive

    followed = drive(connect(None, None), path)
    if followed.result.code:
        _say(followed.result.line)
    else:
        click.echo(followed.reference)
    return followed.result.code


def _prepare(place: Place, wish: Wish, salt: str = "") -> Prepared:
    from tunemill.kube.request import prepare
    from tunemill.kube.resources import gpus_for

    gpus = gpus_for(wish.component, wish.gpus, place.cluster)
    wish = _with_nodes(place, wish, gpus)
    extra = (*(["gpu"] if gpus else []), *(["shards"] if wish.shards else []), *_together(wish))
    return prepare(wish, _objects(place.cluster, *extra), place.cluster, place.store, salt)


def _together(wish: Wish) -> list[str]:
    """Return the component of a training in several processes, whose pods need a Service to meet."""
    return ["multinode"] if wish.nodes else []


def _with_nodes(place: Place, wish: Wish, gpus: int) -> Wish:
    """Let several GPUs of one node train by a process each, unless the tree has a number of nodes already."""
    from tunemill.kube.render import pick

    if wish.stage != "train" or wish.nodes or gpus < 2:
        return wish
    tree = pick(_objects(place.cluster), "train")["spec"]
    return wish if tree.get("completionMode") == "Indexed" else replace(wish, nodes=1)


def _shared_out(place: Place, wish: Wish) -> list[Wish]:
    """Return the Jobs of a wish in their order: infer in shards is followed by the Job that joins them."""
    from tunemill.kube.render import pick

    if wish.stage != "infer":
        return [wish]
    tree = pick(_objects(place.cluster), "infer")["spec"]  # cluster.yaml may name the component
    shards = wish.shards or (tree.get("completions") if tree.get("completionMode") == "Indexed" else None)
    if shards is None:
        return [wish]
    from tunemill.recipe import Setting

    divided = replace(wish.recipe, settings={**wish.recipe.settings, "shard_count": Setting(shards, "flag")})
    join = replace(wish, shards=shards, joins=True, recipe=divided, gpus=0, memory=None)
    joined = _prepare(place, join)
    all_there = place.store is not None and not joined.missing
    return [join] if joined.existing or all_there else [replace(wish, shards=shards), join]


_BUILT: dict[tuple[Path, tuple[str, ...]], list[Json]] = {}


def _objects(cluster: Cluster, *extra: str) -> list[Json]:
    """Build the tree once for all stages that take the same further components."""
    from tunemill.kube.render import kustomize

    key = (cluster.directory / cluster.overlay, extra)
    if key not in _BUILT:
        _BUILT[key] = kustomize(cluster, extra)
    return _BUILT[key]


def _connect(cluster: Cluster) -> Api:
    from tunemill.kube.api import connect

    return connect(cluster.context, cluster.namespace)


def _check(api: Api, cluster: Cluster, prepared: Prepared) -> None:
    from tunemill.kube.submit import check

    check(api, prepared.job, cluster)
    api.create(api.jobs, prepared.job, dry_run=True)


def _dry_run(api: Api, cluster: Cluster, prepared: Prepared) -> None:
    _check(api, cluster, prepared)
    request = prepared.request
    _say(f"{request.stage}: would submit {request.name} ({request.image}, {request.gpus} GPUs)")
    for line in prepared.missing:
        _say(f"  {line}")


def _record(prepared: Prepared, code: int, reference: str, reused: bool) -> dict[str, Any]:
    request = prepared.request
    return {
        "stage": request.stage,
        "job": None if reused else request.name,
        "reference": reference,
        "reused": reused,
        "exit_code": code,
        "action_key": request.key,
        "manifest": None if reused else prepared.job,
    }


def _print(records: Sequence[dict[str, Any]], flags: Flags) -> None:
    """Print the last stage's result: what it made, its Job when detached, its manifest in a dry run."""
    if flags.as_json:
        shown = [
            {key: value for key, value in record.items() if flags.dry_run or key != "manifest"}
            for record in records
        ]
        click.echo(json.dumps(shown[0] if len(shown) == 1 else {"stages": shown}))
    elif flags.dry_run:
        import yaml

        manifests = [record["manifest"] for record in records if record["manifest"]]
        click.echo(yaml.safe_dump_all(manifests, sort_keys=False), nl=False)
    elif records and not records[-1]["exit_code"]:
        click.echo(records[-1]["reference"])


def _say(message: str) -> None:
    Progress().say(message)

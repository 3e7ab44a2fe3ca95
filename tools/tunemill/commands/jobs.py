"""``tunemill status``, ``logs``, ``wait`` and ``cancel``: the Jobs that ``submit`` made."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from tunemill import options

if TYPE_CHECKING:
    from tunemill.kube.api import Api, Json
    from tunemill.kube.settings import Cluster

log = logging.getLogger("tunemill")


@click.command(epilog="\b\nExamples:\n  tunemill status\n  tunemill status train-llama3-cap-0123456789")
@click.argument("job", required=False)
@options.cluster
@options.json
def status(job: str | None, cluster_file: str | None, as_json: bool) -> None:
    """List the Jobs in the cluster, or say how one of them is, and why it waits."""
    from tunemill.kube.submit import find

    api, cluster = _open(cluster_file)
    jobs = [find(api, job)] if job else _list(api)
    rows = [_row(api, found, cluster) for found in jobs]
    if as_json:
        click.echo(json.dumps(rows[0] if job else {"jobs": rows}))
        return
    if not rows:
        log.info("there are no Jobs of Tunemill in namespace %s", api.namespace)
        return
    from tunemill.commands.pipeline import aligned

    table = [("job", "state", "age", "")]
    table += [(row["job"], row["state"], row["age"], row["why"] or row["output"]) for row in rows]
    click.echo(aligned(table))


@click.command(
    epilog="\b\nExamples:\n  tunemill logs train-llama3-cap-0123456789\n"
    "  tunemill logs -f train-llama3-cap-0123456789"
)
@click.argument("job")
@click.option(
    "-f", "--follow", "following", is_flag=True, help="Stay until the Job has ended; Ctrl-C detaches."
)
@options.cluster
def logs(job: str, following: bool, cluster_file: str | None) -> int:
    """Show what a Job's newest pod has written, or follow it to its end.

    Followed, it ends as 'submit' does: with the reference of the output and the stage's exit code.
    """
    from tunemill.kube.submit import find

    api, cluster = _open(cluster_file)
    found = find(api, job)
    if following:
        return _follow(api, job, cluster, logs=True)
    for line in _lines(api, found):
        click.echo(line)
    return 0


@click.command(
    epilog="\b\nExamples:\n  tunemill wait train-llama3-cap-0123456789\n"
    "  tunemill wait --cluster other.yaml train-llama3-cap-0123456789"
)
@click.argument("job")
@options.cluster
def wait(job: str, cluster_file: str | None) -> int:
    """Wait until a Job has ended, and end with its exit code."""
    from tunemill.kube.submit import find

    api, cluster = _open(cluster_file)
    find(api, job)
    return _follow(api, job, cluster, logs=False)


@click.command(
    epilog="\b\nExamples:\n  tunemill cancel train-llama3-cap-0123456789\n"
    "  tunemill cancel --cluster other.yaml train-llama3-cap-0123456789"
)
@click.argument("job")
@options.cluster
def cancel(job: str, cluster_file: str | None) -> None:
    """End a Job: its stage saves what it can, and the same submit goes on from there."""
    from tunemill.kube.submit import cancel as cancel_job

    api, _ = _open(cluster_file)
    log.info("%s %s", job, "is being ended" if cancel_job(api, job) else "had ended already and is removed")


def _open(cluster_file: str | None) -> tuple[Api, Cluster]:
    from tunemill.kube.api import connect
    from tunemill.kube.settings import find_cluster_file, read_cluster

    cluster = read_cluster(find_cluster_file(cluster_file))
    return connect(cluster.context, cluster.namespace), cluster


def _follow(api: Api, job: str, cluster: Cluster, logs: bool) -> int:
    from tunemill.commands.submit import follow_to_the_end

    code, reference = follow_to_the_end(api, job, cluster, logs)
    if not code:
        click.echo(reference)
    return code


def _list(api: Api) -> list[Json]:
    found = api.get(api.jobs, labelSelector="app.kubernetes.io/name=tunemill")["items"]
    return sorted(found, key=lambda job: str(job["metadata"]["creationTimestamp"]))


def _row(api: Api, job: Json, cluster: Cluster) -> dict[str, Any]:
    from tunemill.kube.outcome import finished, output_of, result_of, state
    from tunemill.kube.render import COMPONENT_LABEL

    metadata = job["metadata"]
    created = datetime.fromisoformat(metadata["creationTimestamp"])
    done = finished(job)
    code = result_of(job, _pods(api, job)).code if done else None
    shown = state(job) if not code else f"{state(job)} ({code})"
    return {
        "job": metadata["name"],
        "stage": metadata.get("labels", {}).get(COMPONENT_LABEL, ""),
        "state": shown,
        "exit_code": code,
        "age": _age((datetime.now(UTC) - created).total_seconds()),
        "output": output_of(job),
        "why": "" if done else _why(api, job, cluster),
    }


def _why(api: Api, job: Json, cluster: Cluster) -> str:
    from tunemill.errors import DeniedError
    from tunemill.kube.follow import largest, look

    resource = cluster.gpu.resource if cluster.gpu else "nvidia.com/gpu"
    pods = _pods(api, job)
    uids = {job["metadata"]["uid"], *(pod["metadata"]["uid"] for pod in pods)}
    try:
        events = [
            event for event in api.get(api.events)["items"] if event["involvedObject"].get("uid") in uids
        ]
    except DeniedError:
        events = []  # the pods' own state tells most of it
    events.sort(key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""))
    why = look(api, job, pods, events, resource, lambda: largest(api, resource))
    return why.line if why else ""


def _pods(api: Api, job: Json) -> list[Json]:
    from tunemill.kube.follow import POD_OF

    found = api.get(api.pods, labelSelector=f"{POD_OF}={job['metadata']['uid']}")["items"]
    return sorted(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))


def _lines(api: Api, job: Json) -> list[str]:
    """Return the log of the newest pod that has one."""
    from tunemill.kube.logs import started
    from tunemill.kube.render import CONTAINER

    pods = [pod for pod in _pods(api, job) if started(pod) != "waiting"]
    if not pods:
        log.info(
            "%s has not started: 'tunemill status %s' says why",
            job["metadata"]["name"],
            job["metadata"]["name"],
        )
        return []
    path = f"{api.pods}/{pods[-1]['metadata']['name']}/log"
    with api.lines(path, {"container": CONTAINER}) as lines:
        return list(lines)


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"

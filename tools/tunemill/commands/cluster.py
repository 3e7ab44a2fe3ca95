"""``tunemill cluster``: look at a cluster once, and write down what submitting needs to know of it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tunemill import options
from tunemill.errors import DeniedError, UsageError

if TYPE_CHECKING:
    from tunemill.kube.api import Api
    from tunemill.kube.look import Found

STAGE_IMAGES = ("prepare", "train", "merge", "convert", "quantize", "infer", "store")
CUDA_IMAGES = ("train-cuda", "gptq-cuda", "quantize-cuda", "infer-cuda")

log = logging.getLogger("tunemill")


@click.group(epilog="\b\nExamples:\n  tunemill cluster init --namespace tunemill\n  tunemill cluster show")
def cluster() -> None:
    """Look at a Kubernetes cluster and say how to submit to it."""


@cluster.command(
    epilog="\b\nExamples:\n  tunemill cluster init --namespace tunemill\n"
    "  tunemill cluster init --overlay k8s/overlays/laptop --registry registry.example/tunemill --store s3://tunemill"
)
@click.option("--context", metavar="NAME", help="Context of the kubeconfig.  [default: its current one]")
@click.option("--namespace", metavar="NAME", help="Namespace to submit to.  [default: the context's]")
@click.option(
    "--overlay",
    metavar="DIRECTORY",
    default="k8s/overlays/laptop",
    show_default=True,
    help="Kustomize directory with the Jobs.",
)
@click.option(
    "--registry",
    metavar="NAME",
    default="tunemill",
    show_default=True,
    help="Where the images are, before /train.",
)
@click.option(
    "--store",
    "store_url",
    metavar="URL",
    envvar="TUNEMILL_STORE",
    help="The store as pods reach it: s3://bucket/prefix.",
)
@click.option(
    "--endpoint",
    metavar="URL",
    envvar="AWS_ENDPOINT_URL_S3",
    help="Address of the S3 server as pods reach it.",
)
@options.cluster
@click.option("--force", is_flag=True, help="Replace the file that is there.")
def init(
    context: str | None,
    namespace: str | None,
    overlay: str,
    registry: str,
    store_url: str | None,
    endpoint: str | None,
    cluster_file: str | None,
    force: bool,
) -> None:
    """Look at the cluster and write cluster.yaml.

    Says what it found, and each missing right by its verb and resource. Nothing in the cluster is changed.
    """
    from tunemill.files import write_text
    from tunemill.kube.api import connect, current_context
    from tunemill.kube.look import look_around
    from tunemill.kube.settings import find_cluster_file

    path = find_cluster_file(cluster_file)
    if path.exists() and not force:
        raise UsageError(f"{path} is there already: --force replaces it")
    chosen = context or current_context()
    api = connect(chosen, namespace)
    found = look_around(api, "tunemill-store")
    tell(api, found)
    settings = {"context": chosen, "namespace": api.namespace, "overlay": overlay, "registry": registry}
    write_text(path, file_text(found, {**settings, "store": store_url, "endpoint": endpoint}))
    click.echo(str(path))
    if found.missing:
        raise DeniedError(
            f"{path} is written, but rights are missing in namespace {api.namespace}: "
            f"{', '.join(found.missing)}; ask your administrator for them"
        )


@cluster.command(epilog="\b\nExamples:\n  tunemill cluster show\n  tunemill cluster show --json")
@options.cluster
@options.json
def show(cluster_file: str | None, as_json: bool) -> None:
    """Show what cluster.yaml says, with the defaults."""
    from tunemill.kube.settings import find_cluster_file, read_cluster

    values = read_cluster(find_cluster_file(cluster_file)).model_dump(mode="json", by_alias=True)
    if as_json:
        click.echo(json.dumps(values))
        return
    for key, value in values.items():
        shown = json.dumps(value) if isinstance(value, dict | list) else value
        click.echo(f"{key:<14} {'-' if value is None else shown}")


def tell(api: Api, found: Found) -> None:
    """Say on the log what looking found."""
    log.info("Kubernetes %s at %s", found.version, api.where)
    exists = {True: "", False: ", which does not exist", None: ", which may not be read"}[
        found.namespace_exists
    ]
    log.info(
        "namespace %s%s; Pod Security: %s",
        api.namespace,
        exists,
        found.pod_security or "nothing enforced, or not readable",
    )
    log.info(
        "Kueue: %s",
        f"{found.kueue}, queues: {', '.join(found.queues) or 'none here'}" if found.kueue else "none",
    )
    if found.gpus is None:
        log.info("GPUs: nodes may not be listed; ask how many one node has and set gpu.count")
    else:
        log.info(
            "GPUs: %s", "; ".join(f"{number} {name} on {node}" for name, number, node in found.gpus) or "none"
        )
    log.info("default storage class: %s", found.storage_class or "none")
    if found.secret is False:
        log.info(
            "there is no secret tunemill-store: make it from your AWS credentials file by 'kubectl -n %s "
            "create secret generic tunemill-store --from-file=credentials=FILE'",
            api.namespace,
        )
    for right in found.missing:
        log.info("missing right: %s in namespace %s", right, api.namespace)


def file_text(found: Found, chosen: dict[str, Any]) -> str:
    """Return cluster.yaml, each key with a comment."""
    name, number, node = max(found.gpus or [], key=lambda offer: offer[1], default=("nvidia.com/gpu", 0, ""))
    gpu_comment = (
        f"{number} on {node}" if number else "none was seen; raise it where nodes are started on demand"
    )
    if found.gpus is None:
        gpu_comment = "nodes may not be listed; null checks nothing"
    queue = found.queues[0] if len(found.queues) == 1 else None
    queue_comment = (
        f"of {', '.join(found.queues)}" if found.queues else "this cluster has no LocalQueue in the namespace"
    )
    images = [*STAGE_IMAGES, *(CUDA_IMAGES if number or found.gpus is None else ())]
    lines = [
        f"# Written by 'tunemill cluster init' after a look at Kubernetes {found.version}; yours to change.",
        f"context: {_yaml(chosen['context'])}",
        f"namespace: {_yaml(chosen['namespace'])}",
        f"overlay: {_yaml(_shortest(chosen['overlay']))} # kustomize directory, relative to this file",
        "components: [] # more of k8s/components, by name",
        f"registry: {_yaml(chosen['registry'])} # images are REGISTRY/train and so on",
        "images: # digests: docker buildx imagetools inspect REGISTRY/train:TAG, the line 'Digest'",
        *(f"  {image}: null" for image in images),
        f"queue: {_yaml(queue)} # Kueue's LocalQueue, {queue_comment}",
        "priorityClass: null",
        "nodeSelector: {}",
        "tolerations: []",
        *_store_lines(chosen),
        "gpu:",
        f"  resource: {name}",
        f"  count: {'null' if found.gpus is None else number} # most that one node has: {gpu_comment}",
        f"  memory: {found.gpu_memory or 'null'} # of one GPU: a training that needs more is refused",
        "cacheVolume: null # a PersistentVolumeClaim to keep /work on, in place of the pod's own",
    ]
    return "\n".join(lines) + "\n"


def _store_lines(chosen: dict[str, Any]) -> list[str]:
    if not chosen["store"]:
        return ["store: null # {url: s3://bucket/prefix, endpoint: https://…, region: …}, as pods reach it"]
    return [
        "store: # as pods reach it",
        f"  url: {_yaml(chosen['store'])}",
        f"  endpoint: {_yaml(chosen['endpoint'])}",
        f"  region: {_yaml(os.environ.get('AWS_DEFAULT_REGION'))}",
        "  secret: tunemill-store # with the key 'credentials', an AWS credentials file",
    ]


def _yaml(value: str | None) -> str:
    return "null" if value is None else json.dumps(value)


def _shortest(path: str) -> str:
    return str(Path(path))

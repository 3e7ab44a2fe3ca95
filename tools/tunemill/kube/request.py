"""From what a user asked for to a Job: is it done already, what is it called, what does it get?"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tunemill.action import resolved
from tunemill.errors import ConfigurationError, DeniedError, TransientError, UsageError
from tunemill.image import IMAGES
from tunemill.kube.api import Json
from tunemill.kube.naming import job_name, request_key
from tunemill.kube.render import FILES, Request, fill, pick, stage_container
from tunemill.kube.resources import (
    at_least,
    check_gpu_memory,
    gpus_for,
    image_name,
    memory_for,
    parse_quantity,
    work_for,
)
from tunemill.kube.settings import Cluster
from tunemill.recipe import Choice, Recipe
from tunemill.stage import Plan, plan
from tunemill.stages import load_stage
from tunemill.store import Artifact, Store, open_store

REACH_SECONDS = 3.0  # a store inside the cluster does not answer outside it; there is no use in waiting
DEFAULT_PORTS = {"http": 80, "https": 443}

log = logging.getLogger("tunemill")


@dataclass(frozen=True)
class Wish:
    """One stage that somebody wants to run in a cluster."""

    stage: str
    choice: Choice
    recipe: Recipe
    """The same, resolved."""
    inputs: Mapping[str, str]
    """Roles to references."""
    gpus: int | None = None
    memory: str | None = None
    shards: int | None = None
    """Pods that share the rows of infer."""
    joins: bool = False
    """Of sharded infer: the Job that joins what the shards predicted."""
    nodes: int | None = None
    """Pods that train together; the tree's own number if None."""

    @property
    def component(self) -> str:
        """The Job of the tree that it runs as."""
        return "join" if self.joins else self.stage


@dataclass(frozen=True)
class Prepared:
    """What becomes of a wish."""

    wish: Wish
    existing: Artifact | None
    """Its output, when there is one; nothing has to be submitted then."""
    missing: Sequence[str]
    """What is wrong with inputs that the store does not have."""
    request: Request
    files: Mapping[str, str]
    """Name to text of the recipe files that go with it."""
    job: Json


def see_store(cluster: Cluster, given: str | None) -> Store | None:
    """Open the pods' store from here; None, with a line that says why, where that is not possible.

    Raises:
        UsageError: its address is none.
    """
    url = given or (cluster.store.url if cluster.store else os.environ.get("TUNEMILL_STORE"))
    if not url:
        log.info("the store is not known here (store.url in cluster.yaml): %s", UNSEEN)
        return None
    _use_endpoint(cluster)
    try:
        _reach(os.environ.get("AWS_ENDPOINT_URL_S3") if url.startswith("s3:") else None)
        return open_store(url)
    except (ConfigurationError, DeniedError, TransientError) as error:
        log.info("the store is not seen from here (%s): %s", error, UNSEEN)
        return None


UNSEEN = "the Job is named after its configuration and looks by itself whether its output exists"


def prepare(
    wish: Wish, objects: Sequence[Json], cluster: Cluster, store: Store | None, salt: str = ""
) -> Prepared:
    """Return the Job of a wish, without asking the cluster for anything.

    Raises:
        UsageError: the wish contradicts itself.
        ConfigurationError: cluster.yaml or the tree lack something.
    """
    planned = _plan(wish, store)
    words, files = arguments(wish)
    config = wish.recipe.configure(load_stage(wish.stage))
    output = wish.recipe.format(load_stage(wish.stage).output, config)
    key = planned.key if planned and planned.key and not salt else None
    key = key or request_key(wish.component, resolved(config), [*words, *files.values()], salt)
    if wish.shards:
        key = request_key(wish.component, {"shards": wish.shards}, [key])
    run = wish.recipe.names.get("run") or wish.recipe.names.get("model") or output
    gpus = gpus_for(wish.component, wish.gpus, cluster)
    template = pick(objects, wish.component)
    sizes = {role: artifact.size for role, artifact in planned.inputs.items()} if planned else {}
    if gpus and wish.stage == "train" and planned and "base" in planned.inputs:
        check_gpu_memory(planned.inputs["base"].facts, resolved(config), cluster)
    request = Request(
        stage=wish.stage,
        name=job_name(wish.component, run, key),
        run=run,
        arguments=tuple(words),
        image=cluster.image(image_name(IMAGES[wish.stage], gpus)),
        key=key,
        output=output,
        gpus=gpus,
        memory=_memory(wish, template, sizes, resolved(config), gpus),
        work=at_least(work_for(sizes), _work_size(template)),
        files=tuple(files),
        shards=wish.shards,
        nodes=wish.nodes,
    )
    existing = planned.existing if planned and not load_stage(wish.stage).binds_host else None
    missing = tuple(planned.missing.values()) if planned else ()
    return Prepared(wish, existing, missing, request, files, fill(template, request, cluster))


def arguments(wish: Wish) -> tuple[list[str], dict[str, str]]:
    """Return the words for ``tunemill`` in the pod, and the recipe files that they name.

    Raises:
        UsageError: two files have one name, or one cannot be read.
    """
    files: dict[str, str] = {}
    words = [wish.stage]
    given = {"--model": wish.choice.model, "--task": wish.choice.task, "--recipe": wish.choice.file}
    for option, value in given.items():
        if value and (option == "--recipe" or value.endswith((".yaml", ".yml"))):
            words += [option, _take_file(value, files)]
        elif value:
            words += [option, value]
    if run := wish.recipe.names.get("run"):
        words += ["--run", run]
    words += [word for setting in wish.choice.settings for word in ("--set", setting)]
    words += [word for role, reference in wish.inputs.items() for word in ("--input", f"{role}={reference}")]
    return words, files


def _take_file(path: str, files: dict[str, str]) -> str:
    name = Path(path).name
    if name in files:
        raise UsageError(
            f"two recipe files are called {name}: rename one, they go into one directory of the pod"
        )
    try:
        files[name] = Path(path).read_text("utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    return f"{FILES}/{name}"


def _plan(wish: Wish, store: Store | None) -> Plan | None:
    if store is None:
        return None
    try:
        return plan(store, load_stage(wish.stage), wish.recipe, wish.inputs)
    except (ModuleNotFoundError, TransientError) as error:  # what it reads may take libraries, or the Hub
        log.info("the action of %s is not known here (%s): %s", wish.stage, error, UNSEEN)
        return None


def _memory(
    wish: Wish, template: Json, sizes: Mapping[str, int], settings: Mapping[str, object], gpus: int
) -> str | None:
    if wish.memory:
        parse_quantity(wish.memory)
        return wish.memory
    limits = stage_container(template["spec"]["template"]).get("resources", {}).get("limits", {})
    return at_least(memory_for(wish.stage, sizes, settings, gpus), limits.get("memory"))


def _work_size(template: Json) -> str | None:
    for volume in template["spec"]["template"]["spec"].get("volumes") or []:
        if volume["name"] == "work":
            return (volume.get("emptyDir") or {}).get("sizeLimit")
    return None


def _use_endpoint(cluster: Cluster) -> None:
    """Let this process find the store where pods find it, unless the user's environment says otherwise."""
    if cluster.store and cluster.store.endpoint:
        os.environ.setdefault("AWS_ENDPOINT_URL_S3", cluster.store.endpoint)
    if cluster.store and cluster.store.region:
        os.environ.setdefault("AWS_DEFAULT_REGION", cluster.store.region)


def _reach(endpoint: str | None) -> None:
    if not endpoint:
        return
    try:
        parts = urlsplit(endpoint)
        port = parts.port or DEFAULT_PORTS.get(parts.scheme, 443)
        socket.create_connection((parts.hostname or "", port), REACH_SECONDS).close()
    except (OSError, ValueError) as error:
        raise TransientError(f"{endpoint}: {error}") from error

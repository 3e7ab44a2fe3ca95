"""``cluster.yaml``: what submitting needs to know of a cluster, written by ``tunemill cluster init``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunemill.errors import ConfigurationError
from tunemill.recipe import parse_yaml

FILE = "cluster.yaml"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class StorePart(_Part):
    """The store as pods reach it."""

    url: str = Field(description="s3://bucket/prefix")
    endpoint: str | None = Field(None, description="Address of the S3 server; AWS's own if not given")
    region: str | None = Field(None, description="Region of the bucket")
    secret: str = Field("tunemill-store", description="Secret with the key 'credentials'")


class GpuPart(_Part):
    """The GPUs of its nodes."""

    resource: str = Field("nvidia.com/gpu", description="Name under which nodes offer them")
    count: int | None = Field(None, ge=0, description="Most that one node has, also one not started yet")
    memory: str | None = Field(None, description="Memory of one; null checks nothing")


class Toleration(_Part):
    """A taint that pods put up with."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    tolerationSeconds: int | None = None


class Cluster(_Part):
    """One cluster."""

    context: str | None = None
    namespace: str | None = None
    overlay: str = "k8s/base"
    components: list[str] = Field(default_factory=list)
    registry: str = "tunemill"
    images: dict[str, str | None] = Field(default_factory=dict)
    queue: str | None = None
    priority_class: str | None = Field(None, alias="priorityClass")
    node_selector: dict[str, str] = Field(default_factory=dict, alias="nodeSelector")
    tolerations: list[Toleration] = Field(default_factory=list)
    store: StorePart | None = None
    gpu: GpuPart | None = None
    cache_volume: str | None = Field(
        None, alias="cacheVolume", description="A PersistentVolumeClaim for /work"
    )
    directory: Path = Field(Path(), exclude=True)
    """Where the file is; its paths are relative to it."""

    def image(self, name: str) -> str:
        """Return ``registry/name@sha256:…`` of an image; ``train-cuda`` is train's with the suffix.

        Raises:
            ConfigurationError: the file gives no digest for it.
        """
        given = self.images.get(name) or ""
        digest = DIGEST.search(given)
        repository = f"{self.registry}/{name.removesuffix('-cuda')}"
        if not digest:
            tag = f"{repository}:{given or ('TAG-cuda' if name.endswith('-cuda') else 'TAG')}"
            raise ConfigurationError(
                f"images.{name} in {FILE} has no digest (sha256:…): 'docker buildx imagetools inspect {tag}' "
                "says it"
            )
        return f"{repository}@{digest[0]}"


def find_cluster_file(given: str | None) -> Path:
    """Return the file of ``--cluster``, of TUNEMILL_CLUSTER, or of this directory."""
    return Path(given or os.environ.get("TUNEMILL_CLUSTER") or FILE)


def read_cluster(path: Path) -> Cluster:
    """Read one.

    Raises:
        ConfigurationError: it is not there, or says something it cannot; all of it is named.
    """
    try:
        value = parse_yaml(path.read_text("utf-8")) or {}
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error.strerror}): 'tunemill cluster init' writes it"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not YAML: {error}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path} has to be a mapping of keys to values")
    try:
        return Cluster(**{**_without_null(value), "directory": path.resolve().parent})
    except ValidationError as error:
        found = "; ".join(_complaint(problem) for problem in error.errors(include_url=False))
        raise ConfigurationError(f"{path}: {found}") from error


def _without_null(value: dict[str, Any]) -> dict[str, Any]:
    return {key: entry for key, entry in value.items() if entry is not None and key != "directory"}


def _complaint(problem: Any) -> str:
    return (
        f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
    )

"""What kustomize makes of k8s/: of the base, of every overlay, and of every component on the base."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TREE = ROOT / "k8s"
Json = dict[str, Any]

COMPONENTS = tuple(sorted(path.parent.name for path in TREE.glob("components/*/kustomization.yaml")))
OVERLAYS = tuple(sorted(path.parent.name for path in TREE.glob("overlays/*/kustomization.yaml")))
APART = {"cache": {"scratch"}, "store": {"external-store"}}
"""Components of which one takes the other's place."""


def _without(left_out: set[str]) -> tuple[str, ...]:
    return tuple(name for name in COMPONENTS if name not in left_out)


CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "base": ("base", ()),
    "administrator": ("administrator", ()),
    **{f"overlay-{name}": (f"overlays/{name}", ()) for name in OVERLAYS},
    **{f"component-{name}": ("base", (name,)) for name in COMPONENTS},
    "all-components": ("base", _without({"scratch", "external-store"})),
    "all-components-backwards": ("base", _without({"cache", "store"})[::-1]),
}
"""What is rendered: a folder below k8s/, and components put on it."""


@functools.cache
def render(case: str) -> tuple[Json, ...]:
    """Return the objects of a case, in a namespace, as the client asks for them."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed here, which builds the manifests")
    folder, components = CASES[case]
    with tempfile.TemporaryDirectory() as place:
        tree = {
            "resources": [os.path.relpath(TREE / folder, place)],
            "components": [os.path.relpath(TREE / "components" / name, place) for name in components],
            "namespace": "tunemill",
        }
        Path(place, "kustomization.yaml").write_text(yaml.safe_dump(tree))
        built = subprocess.run(
            ["kubectl", "kustomize", place], capture_output=True, text=True, check=False, timeout=60
        )
    assert built.returncode == 0, built.stderr
    assert "Warning" not in built.stderr, built.stderr
    return tuple(yaml.safe_load_all(built.stdout))


def job_specs(objects: tuple[Json, ...]) -> Iterator[tuple[str, Json]]:
    """Yield name and spec of every Job, also of those that a JobSet or a TrainingRuntime makes."""
    for found in objects:
        if found["kind"] == "Job":
            yield found["metadata"]["name"], found["spec"]
        wrapped = found["spec"]["template"] if found["kind"] == "TrainingRuntime" else found
        if found["kind"] in ("JobSet", "TrainingRuntime"):
            for replicated in wrapped["spec"]["replicatedJobs"]:
                yield f"{found['metadata']['name']}-{replicated['name']}", replicated["template"]["spec"]


def pods(objects: tuple[Json, ...]) -> Iterator[tuple[str, Json]]:
    """Yield name and template of every pod."""
    for name, spec in job_specs(objects):
        yield name, spec["template"]
    for found in objects:
        if found["kind"] == "StatefulSet":
            yield found["metadata"]["name"], found["spec"]["template"]


def of_kind(objects: tuple[Json, ...], kind: str) -> dict[str, Json]:
    """Return the objects of one kind by their names."""
    return {found["metadata"]["name"]: found for found in objects if found["kind"] == kind}

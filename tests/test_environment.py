"""The conda set-up and pyproject.toml say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def environment() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "environment.yml").read_text())


def test_python_bound_is_the_same(project: dict[str, Any], environment: dict[str, Any]) -> None:
    assert f"python{project['requires-python']}" in environment["dependencies"]


def test_conda_installs_extras_that_exist_and_nothing_twice(
    project: dict[str, Any], environment: dict[str, Any]
) -> None:
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    extras = re.fullmatch(r"--editable \.\[(.+)\]", pip)
    assert extras is not None
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
    required = {
        re.split(r"[\[<>=]", line)[0]
        for lines in [project["dependencies"], *project["optional-dependencies"].values()]
        for line in lines
    }
    assert required.isdisjoint(re.split(r"[<>=]", entry)[0] for entry in conda)


def test_the_all_extra_holds_every_stage_and_the_cluster_s_client(project: dict[str, Any]) -> None:
    (everything,) = project["optional-dependencies"]["all"]
    stages = {"prepare", "train", "merge", "convert", "quantize", "infer", "evaluate", "kube"}
    assert set(everything.removeprefix("tunemill[").removesuffix("]").split(",")) == stages


def test_one_version_of_each_package_in_all_extras(project: dict[str, Any]) -> None:
    versions: dict[str, set[str]] = {}
    for lines in project["optional-dependencies"].values():
        for line in lines:
            name = re.split(r"[\[<>=]", line)[0]
            versions.setdefault(name, set()).add(line)
    del versions["tunemill"]
    assert {name: bounds for name, bounds in versions.items() if len(bounds) > 1} == {}

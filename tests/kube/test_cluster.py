"""``tunemill cluster init`` writes a file that ``submit`` reads, and names what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from apiserver import Cluster
from tunemill.kube.settings import read_cluster

Run = Callable[..., tuple[int, str, str]]
INIT = ("cluster", "init", "--cluster", "new.yaml")


@pytest.fixture
def rich(cluster: Cluster) -> Cluster:
    cluster.kueue = True
    cluster.put("localqueues", {"metadata": {"name": "gpu"}})
    cluster.put("nodes", {"metadata": {"name": "n1"}, "status": {"allocatable": {"nvidia.com/gpu": "2"}}})
    cluster.put(
        "nodes",
        {
            "metadata": {"name": "n2", "labels": {"nvidia.com/gpu.memory": "81559"}},
            "status": {"allocatable": {"nvidia.com/gpu": "8"}},
        },
    )
    default = {"storageclass.kubernetes.io/is-default-class": "true"}
    cluster.put("storageclasses", {"metadata": {"name": "fast", "annotations": default}})
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.put("namespaces", {"metadata": {"name": "lab", "labels": labels}})
    return cluster


def test_what_was_found_is_said_and_written(rich: Cluster, run: Run, tmp_path: Path) -> None:
    code, stdout, stderr = run(*INIT, "--store", "s3://lab/x", "--endpoint", "https://s3.example")
    assert (code, stdout) == (0, "new.yaml\n")
    for line in (
        "Kubernetes v1.36.0 at http://127.0.0.1",
        "namespace lab; Pod Security: restricted",
        "Kueue: kueue.x-k8s.io/v1beta1, queues: gpu",
        "GPUs: 8 nvidia.com/gpu on n2",
        "default storage class: fast",
    ):
        assert line in stderr
    found = read_cluster(tmp_path / "new.yaml")
    assert (found.context, found.namespace, found.queue) == ("lab", "lab", "gpu")
    assert found.gpu
    assert (found.gpu.resource, found.gpu.count, found.gpu.memory) == ("nvidia.com/gpu", 8, "81559Mi")
    assert found.store
    assert (found.store.url, found.store.endpoint) == ("s3://lab/x", "https://s3.example")
    text = (tmp_path / "new.yaml").read_text()
    assert all("#" in line for line in text.splitlines() if line.startswith(("images", "queue", "gpu.count")))


def test_it_changes_nothing_in_the_cluster(rich: Cluster, run: Run) -> None:
    assert run(*INIT)[0] == 0
    assert {path for method, path in rich.requests if method != "GET"} == {
        path for method, path in rich.requests if "selfsubjectaccessreviews" in path
    }


def test_missing_rights_are_named_and_the_file_is_written_all_the_same(
    rich: Cluster, run: Run, tmp_path: Path
) -> None:
    rich.denied |= {("create", "jobs"), ("get", "pods/log"), ("list", "nodes"), ("get", "namespaces")}
    code, _, stderr = run(*INIT)
    assert code == 77
    assert "missing right: create jobs.batch in namespace lab" in stderr
    assert stderr.splitlines()[-1].startswith(
        "tunemill: new.yaml is written, but rights are missing in namespace lab: "
        "create jobs.batch, get pods/log;"
    )
    assert "nodes may not be listed" in stderr
    found = read_cluster(tmp_path / "new.yaml")
    assert found.gpu
    assert found.gpu.count is None


def test_a_bare_cluster(cluster: Cluster, run: Run, tmp_path: Path) -> None:
    cluster.remove("secrets", "tunemill-store")
    code, _, stderr = run(*INIT, "--namespace", "mars")
    assert code == 0
    assert "namespace mars, which does not exist" in stderr
    assert "kubectl -n mars create secret generic tunemill-store" in stderr
    assert "Kueue: none" in stderr
    assert "GPUs: none" in stderr
    assert read_cluster(tmp_path / "new.yaml").queue is None


def test_a_file_that_is_there_is_kept(cluster: Cluster, run: Run, tmp_path: Path) -> None:
    before = (tmp_path / "cluster.yaml").read_text()
    code, _, stderr = run("cluster", "init")
    assert code == 2
    assert "cluster.yaml is there already: --force replaces it" in stderr
    assert (tmp_path / "cluster.yaml").read_text() == before
    assert run("cluster", "init", "--force")[0] == 0
    assert (tmp_path / "cluster.yaml").read_text() != before


def test_show_tells_what_the_file_says(run: Run) -> None:
    code, stdout, _ = run("cluster", "show", "--json")
    assert code == 0
    assert json.loads(stdout)["registry"] == "registry.example/tunemill"
    assert "registry       registry.example/tunemill" in run("cluster", "show")[1]

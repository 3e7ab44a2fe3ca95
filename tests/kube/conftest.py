"""A cluster behind a real HTTP server, a kubeconfig for it, and the command line in an empty directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from apiserver import TOKEN, Cluster, serve
from tunemill import cli
from tunemill.commands import submit as submit_command
from tunemill.kube import api, follow, logs, submit, watching

Run = Callable[..., tuple[int, str, str]]
TREE = Path(__file__).parents[2] / "k8s"
DIGEST = f"sha256:{'a' * 64}"
SURROUNDINGS = (
    *("TUNEMILL_STORE", "TUNEMILL_CLUSTER", "KUBERNETES_SERVICE_HOST"),
    *("AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"),
)
IMAGES = ("prepare", "train", "train-cuda", "merge", "convert", "quantize", "infer", "infer-cuda", "store")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "PATIENCE", 3.0)
    monkeypatch.setattr(api, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(watching, "PAUSE", 0.1)
    monkeypatch.setattr(logs, "PAUSE", 0.1)
    monkeypatch.setattr(follow, "TICK", 0.1)
    monkeypatch.setattr(follow, "HOPELESS_SECONDS", 0.5)
    monkeypatch.setattr(submit, "GONE_SECONDS", 5.0)
    monkeypatch.setattr(submit_command, "_BUILT", {})


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    state = Cluster()
    state.put("secrets", {"metadata": {"name": "tunemill-store"}})
    server = serve(state)
    write_kubeconfig(tmp_path / "kubeconfig", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    yield state
    server.shutdown()
    server.server_close()


def write_kubeconfig(path: Path, server: str, token: str = TOKEN) -> None:
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "lab",
                "clusters": [{"name": "lab", "cluster": {"server": server}}],
                "users": [{"name": "ada", "user": {"token": token}}],
                "contexts": [
                    {"name": "lab", "context": {"cluster": "lab", "user": "ada", "namespace": "lab"}}
                ],
            }
        )
    )


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Path]:
    """``settings(queue="gpu")`` writes cluster.yaml, with a store in a directory that is seen from here."""

    def write(**given: Any) -> Path:
        values = {
            "overlay": str(TREE / "base"),
            "registry": "registry.example/tunemill",
            "images": dict.fromkeys(IMAGES, DIGEST),
            "store": {"url": str(tmp_path / "store"), "secret": "tunemill-store"},
            **given,
        }
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    settings: Callable[..., Path],
) -> Run:
    """``run(*words)`` in a directory with a cluster.yaml returns code, stdout and stderr."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed here, which builds the manifests")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNEMILL_CACHE", str(tmp_path / "cache"))
    for name in SURROUNDINGS:
        monkeypatch.setenv(name, "")  # so that what the command sets is undone afterwards
        monkeypatch.delenv(name)
    settings()
    (tmp_path / "store").mkdir()

    def run_one(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        cli._talk_on_stderr()
        code = cli.run(words)
        return code, *capfd.readouterr()

    return run_one

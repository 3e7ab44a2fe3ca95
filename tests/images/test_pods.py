"""``tunemill submit`` from the first stage to the report, with real containers behind the API server.

Each pod that the client's Jobs ask for becomes a container with the same user, mounts, environment, arguments
and limits (kubelet.py), beside the real S3 server, in a network without a way out.
"""

from __future__ import annotations

import base64
import csv
import ipaddress
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from apiserver import Cluster, Json, serve

from .conftest import IMAGES, ROOT, Lab, ancestors, inspect, run
from .kubelet import NAMESPACE, Node, addresses_of

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(3600)]

WORDS = ("--model", "tiny", "--task", "stdlib")
MADE = ("--set", "num_hidden_layers=1", "--set", "pretrain_epochs=0.05")
TRAINING = (
    *("--set", "max_steps=24", "--set", "save_steps=4", "--set", "per_device_train_batch_size=4"),
    *("--set", "lora_dropout=0", "--set", "learning_rate=1e-3", "--set", "dtype=float32"),
)
INPUTS = ("--input", "base=base/tiny", "--input", "data=pods/data")
TOLERANCE = 1e-4
"""Between losses of one process and of two: sums of float32 in another order, through AdamW."""


@dataclass
class Site:
    """A cluster of one node, and a user's machine beside it."""

    lab: Lab
    cluster: Cluster
    node: Node
    environment: dict[str, str]
    folder: Path

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tunemill.cli", *words],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def tunemill(self, *words: str) -> tuple[str, str]:
        started = self.start(*words)
        stdout, stderr = started.communicate(timeout=1800)
        assert started.returncode == 0, f"{words}: {stderr[-3000:]}"
        return stdout, stderr

    def pods(self, stage: str, project: str) -> list[str]:
        """Names of a Job's pods in their order."""
        return [name for name in self.node.commands if name.startswith(f"{stage}-{project}-")]

    def wait_for_checkpoint(self, project: str, step: int, submitted: subprocess.Popen[str]) -> None:
        while True:
            assert submitted.poll() is None, submitted.communicate()[1][-3000:]
            listed = json.loads(self.tunemill("store", "ls", "--json")[0] or "[]")
            names = [row["name"] for row in listed if row["name"].startswith(f"{project}/checkpoint-")]
            if (
                names
                and json.loads(self.tunemill("store", "show", names[0], "--json")[0])["facts"]["step"] >= step
            ):
                return

    def adapter(self, project: str) -> Path:
        target = self.folder / project
        self.tunemill("store", "pull", f"{project}/adapter", str(target))
        return target

    def facts(self, project: str) -> Json:
        shown: Json = json.loads(self.tunemill("store", "show", f"{project}/adapter", "--json")[0])["facts"]
        return shown


@pytest.fixture(scope="module")
def site(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    for above in (folder, *folder.parents[:2]):
        above.chmod(0o755)
    network = f"{lab.project}-pods"
    subnet = free_subnet()
    run("docker", "network", "create", "--internal", "--subnet", str(subnet), network)
    run("docker", "network", "connect", "--alias", "s3", network, lab.server)
    cluster = Cluster()
    credentials = (lab.folder / "secrets/credentials").read_bytes()
    data = {"credentials": base64.b64encode(credentials).decode()}
    cluster.put("secrets", {"metadata": {"name": "tunemill-store"}, "data": data})
    server = serve(cluster)
    node = Node(cluster, network, addresses_of(subnet), folder / "volumes")
    node.start()
    try:
        yield Site(lab, cluster, node, user_environment(lab, folder, server.server_port), folder)
    finally:
        server.shutdown()
        server.server_close()
        left = run(
            "docker", "ps", "--quiet", "--filter", f"network={network}", "--filter", f"name={network}-"
        )
        for container in left.stdout.split():
            run("docker", "kill", container, check=False)
        run("docker", "network", "disconnect", "--force", network, lab.server, check=False)
        run("docker", "network", "rm", network, check=False)


def free_subnet() -> ipaddress.IPv4Network:
    """Return addresses that none of Docker's networks has."""
    names = run("docker", "network", "ls", "--quiet").stdout.split()
    taken = [
        ipaddress.ip_network(given["Subnet"])
        for found in json.loads(run("docker", "network", "inspect", *names).stdout)
        for given in found["IPAM"]["Config"] or []
    ]
    candidates = ipaddress.ip_network("10.213.0.0/16").subnets(new_prefix=24)
    return next(
        subnet
        for subnet in candidates
        if isinstance(subnet, ipaddress.IPv4Network)
        and not any(other.version == 4 and subnet.overlaps(other) for other in taken)
    )


def user_environment(lab: Lab, folder: Path, port: int) -> dict[str, str]:
    """Write kubeconfig and cluster.yaml, and return the environment of the user's commands."""
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "lab",
        "clusters": [{"name": "lab", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "ada", "user": {"token": "good"}}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "ada", "namespace": NAMESPACE}}],
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    settings = {
        "overlay": str(ROOT / "k8s/base"),
        "registry": "tunemill",
        "images": {name: str(inspect(f"tunemill/{name}:test")["Id"]) for name in IMAGES},
        "store": {"url": "s3://tunemill", "endpoint": "http://s3:7070", "region": "us-east-1"},
    }
    (folder / "cluster.yaml").write_text(yaml.safe_dump(settings))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TUNEMILL_"))}
    return {
        **kept,
        "KUBECONFIG": str(folder / "kubeconfig"),
        "TUNEMILL_STORE": "s3://tunemill",
        "TUNEMILL_CACHE": str(folder / "cache"),
        "AWS_SHARED_CREDENTIALS_FILE": str(lab.folder / "secrets/credentials"),
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{lab.environment['STORE_PORT']}",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.fixture(scope="module")
def finished(site: Site) -> Site:
    """The site after a pipeline whose inference two pods have shared."""
    words = (*WORDS, *MADE, *TRAINING, "--run", "pods", "--quant", "Q4_K_M", "--shards", "2")
    stdout, _ = site.tunemill("submit", "pipeline", *words)
    assert stdout.startswith("pods/report-q4_k_m@sha256:")
    return site


def test_every_stage_ran_as_a_confined_pod(finished: Site) -> None:
    stages = [name.partition("-")[0] for name in finished.node.commands]
    made = ["fetch", "prepare", "train", "merge", "convert", "quantize"]
    assert stages == [*made, "infer", "infer", "join", "evaluate"]
    for words in finished.node.commands.values():
        text = " ".join(words)
        assert "--user 65532:65532 --group-add 65532 --cap-drop ALL --read-only" in text
        assert "--security-opt no-new-privileges:true" in text
        assert re.search(r"--memory \d{9,}", text)


def test_the_lineage_names_the_pods_images(finished: Site) -> None:
    shown, _ = finished.tunemill("store", "log", "pods/report-q4_k_m", "--json")
    made = ancestors(json.loads(shown))
    assert len(made) == 8
    holders = {"fetch": "prepare", "evaluate": "infer"}
    for stage, artifact in made.items():
        image = f"tunemill/{holders.get(stage, stage)}"
        assert artifact["image"] == f"{image}@{inspect(f'{image}:test')['Id']}"


def test_submitted_again_everything_is_reused(finished: Site) -> None:
    before = len(finished.node.commands)
    words = (*WORDS, *MADE, *TRAINING, "--run", "pods", "--quant", "Q4_K_M", "--shards", "2")
    _, stderr = finished.tunemill("submit", "pipeline", *words)
    assert stderr.count("reusing ") == 8
    # Only the machine that would make it knows whether a quantization may be reused; and the texts of these
    # stages are those of the Python that runs, which is another one in the pods.
    new = [name.partition("-")[0] for name in list(finished.node.commands)[before:]]
    assert set(new) <= {"fetch", "prepare", "quantize"}


def test_bad_data_fails_the_job_at_once_with_the_stage_s_code(finished: Site) -> None:
    words = (
        "--run",
        "wrong",
        "--set",
        "quant=F16",
        "--input",
        "gguf=pods/gguf-f16",
        "--input",
        "data=pods/data",
    )
    started = finished.start("submit", "infer", *WORDS, *words, "--set", "n_ctx=8")
    _, stderr = started.communicate(timeout=300)
    assert started.returncode in (2, 65, 78), stderr
    assert len(finished.pods("infer", "wrong")) == 1
    assert re.search(r"failed with exit code (2|65|78)", stderr)


@pytest.fixture(scope="module")
def calm(finished: Site) -> Path:
    """The adapter of a training that nothing disturbs."""
    finished.tunemill("submit", "train", *WORDS, *TRAINING, *INPUTS, "--run", "calm")
    return finished.adapter("calm")


def test_a_preempted_training_goes_on_to_the_same_adapter(finished: Site, calm: Path) -> None:
    submitted = finished.start("submit", "train", *WORDS, *TRAINING, *INPUTS, "--run", "preempted")
    finished.wait_for_checkpoint("preempted", 4, submitted)
    (first,) = finished.pods("train", "preempted")
    finished.node.preempt(first)
    stdout, stderr = submitted.communicate(timeout=600)
    assert submitted.returncode == 0, stderr
    ended = finished.cluster.get("pods", first)
    assert ended
    assert ended["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 143
    assert stdout.startswith("preempted/adapter@sha256:")
    assert len(finished.pods("train", "preempted")) == 2
    assert "was taken away (PreemptionByScheduler)" in stderr
    assert finished.facts("preempted")["resumed_from_step"] >= 4
    again = finished.adapter("preempted")
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (calm / name).read_bytes()


def losses(adapter: Path) -> list[float]:
    with (adapter / "metrics.csv").open(newline="") as source:
        return [float(row["loss"]) for row in csv.DictReader(source)]


def test_two_nodes_train_as_one_does(finished: Site, calm: Path) -> None:
    finished.tunemill("submit", "train", *WORDS, *TRAINING, *INPUTS, "--run", "nodes", "--nodes", "2")
    pods = finished.pods("train", "nodes")
    assert len(pods) == 2
    assert len({address(finished.node.commands[pod]) for pod in pods}) == 2
    facts = finished.facts("nodes")
    assert (facts["processes"], facts["global_batch"]) == (2, finished.facts("calm")["global_batch"])
    assert losses(finished.adapter("nodes")) == pytest.approx(losses(calm), abs=TOLERANCE)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_node_is_replaced_and_training_goes_on(finished: Site, calm: Path, victim: int) -> None:
    project = f"lost{victim}"
    submitted = finished.start(
        "submit", "train", *WORDS, *TRAINING, *INPUTS, "--run", project, "--nodes", "2"
    )
    finished.wait_for_checkpoint(project, 4, submitted)
    (pod,) = [name for name in finished.pods("train", project) if name.rsplit("-", 2)[1] == str(victim)]
    finished.node.kill(pod)
    _, stderr = submitted.communicate(timeout=900)
    assert submitted.returncode == 0, stderr
    assert len(finished.pods("train", project)) >= 3
    assert finished.facts(project)["resumed_from_step"] >= 4
    assert losses(finished.adapter(project)) == pytest.approx(losses(calm), abs=TOLERANCE)


def address(command: list[str]) -> str:
    return command[command.index("--ip") + 1]


def test_a_cancelled_stage_ends_with_its_container(finished: Site) -> None:
    submitted = finished.start(
        "submit",
        "train",
        *WORDS,
        *TRAINING,
        *INPUTS,
        "--run",
        "cancelled",
        "--set",
        "max_steps=5000",
        "--detach",
    )
    name = submitted.communicate(timeout=60)[0].strip()
    while not finished.pods("train", "cancelled"):
        time.sleep(0.1)
    container = finished.node.containers[finished.pods("train", "cancelled")[0]]
    finished.tunemill("cancel", name)
    for _ in range(600):
        if not run("docker", "ps", "--quiet", "--filter", f"name={container}").stdout:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the container still runs a minute after its Job was cancelled")

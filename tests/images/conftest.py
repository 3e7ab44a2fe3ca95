"""The project's images, built by its own Dockerfiles and bake file, and a lab to run them in.

No registry is asked for anything: the base image is Debian from debootstrap, and the S3 server is Ceph RGW
from Debian's packages. What was built before is reused by the engine's cache.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
TAG = "test"
BASE = "tunemill-test/debian:bookworm"
CEPH_TREE = Path(os.environ.get("TUNEMILL_RGW_ROOT", "/var/lib/tunemill-rgw"))
IMAGES = ("prepare", "train", "merge", "convert", "quantize", "infer", "store")
SECRET = "a-secret-of-the-build"


def run(*command: str | Path, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command; unless ``check`` is False it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert not check or done.returncode == 0, f"{command}: {done.stderr[-4000:]}"
    return done


def exists(image: str) -> bool:
    return run("docker", "image", "inspect", image, check=False).returncode == 0


@pytest.fixture(scope="session")
def engine() -> None:
    if shutil.which("docker") is None or run("docker", "info", check=False).returncode:
        pytest.skip("no Docker engine; `make test-images` starts one")


@pytest.fixture(scope="session")
def base(engine: None) -> str:
    """A Debian like the published slim image: minimal, without documentation."""
    if exists(BASE):
        return BASE
    if os.getuid() or shutil.which("debootstrap") is None:
        pytest.skip("making a base image needs root and debootstrap")
    tree = Path(f"/var/tmp/tunemill-base-{uuid.uuid4().hex[:8]}")  # not /tmp, which may be without devices
    try:
        run("debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", tree)
        for useless in ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info"):
            shutil.rmtree(tree / useless)
        for cache in ("var/cache/apt", "var/lib/apt/lists"):
            shutil.rmtree(tree / cache)
            (tree / cache / "partial").mkdir(parents=True)
        import_tree(BASE, tree)
    finally:
        shutil.rmtree(tree, ignore_errors=True)
    return BASE


def import_tree(image: str, tree: Path, *more: Path) -> None:
    """Make an image of one layer: a tree, and files that go to its root."""
    skipped = [f"--exclude=./{name}" for name in ("dev", "proc", "sys", "srv", "var/cache/apt/archives")]
    command = ["tar", "-c", *skipped, "-C", str(tree), "."]
    for file in more:
        command += ["-C", str(file.parent), file.name]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as packed:
        subprocess.run(["docker", "import", "-", image], stdin=packed.stdout, check=True, capture_output=True)
    assert packed.returncode == 0


@pytest.fixture(scope="session")
def images(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """All CPU images by name."""
    pip_conf = tmp_path_factory.mktemp("site") / "pip.conf"
    pip_conf.write_text(f"[global]\nindex-url = https://{SECRET}@pypi.org/simple\n")
    environment = os.environ | {
        "BASE": base,
        "TAG": TAG,
        "REVISION": "0" * 40,
        "SOURCE": "https://example.org/tunemill",
        "CA_BUNDLE": certificates(),
        "PIP_CONF": str(pip_conf),
        # Two of the five: enough to see that the better one is taken, in half the time.
        "CPU_VARIANTS": "haswell icelake",
        **wheel_house(tmp_path_factory.mktemp("wheels")),
    }
    log = tmp_path_factory.mktemp("bake") / "log"
    command = ["docker", "buildx", "bake", "-f", "images/docker-bake.hcl", "--progress", "plain"]
    with log.open("w") as output:
        done = subprocess.run(command, cwd=ROOT, env=environment, stderr=output, check=False)
    assert done.returncode == 0, log.read_text()[-6000:]
    return {name: f"tunemill/{name}:{TAG}" for name in IMAGES}


def certificates() -> str:
    """The certificates this machine's own clients trust, where it has been told of any."""
    for name in ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        if file := os.environ.get(name):
            return file
    return ""


def wheel_house(folder: Path) -> dict[str, str]:
    """The build variables for PyTorch: pip's local wheel, where it has one, instead of PyTorch's index."""
    listed = run(sys.executable, "-m", "pip", "config", "list").stdout.splitlines()
    found = [line.partition("=")[2].strip("'") for line in listed if ".find-links=" in line]
    for place in {place for places in found for place in places.split()}:
        for wheel in Path(place).glob("torch-*+cpu-*.whl"):
            shutil.copyfile(wheel, folder / wheel.name)
    return {"WHEELS": str(folder), "TORCH_INDEX": ""} if any(folder.iterdir()) else {}


@pytest.fixture(scope="session")
def s3_image(engine: None) -> str:
    """An image with Ceph RGW: the tree that the S3 tests run in a chroot, and what starts it."""
    scripts = (HERE / "serve_ceph.sh", ROOT / "tests/s3/ceph_daemons.sh")
    if not CEPH_TREE.exists() and run(ROOT / "tests/s3/ceph_rgw.sh", "install", check=False).returncode:
        pytest.skip("Ceph RGW could not be installed")
    content = hashlib.sha256(b"".join(script.read_bytes() for script in scripts)).hexdigest()
    image = f"tunemill-test/ceph-rgw:{content[:12]}"
    if not exists(image):
        import_tree(image, CEPH_TREE, *scripts)
    return image


@dataclass
class Lab:
    """The stages and their store: compose/ with the tests' server, under a project name of its own."""

    project: str
    folder: Path
    """A copy of compose/, with keys of its own."""
    files: Path
    """Where the scripts are called."""
    environment: dict[str, str]

    def script(
        self, name: str, *words: str, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run one of compose's scripts to its end."""
        return run(
            self.folder / name, *words, check=check, cwd=self.files, env=self.environment | environment
        )

    def stage(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a stage, or a store command, in its container."""
        return self.script("run.sh", *words, check=check)

    def start(self, name: str, *words: str) -> subprocess.Popen[str]:
        """Start one of compose's scripts."""
        return subprocess.Popen(
            [self.folder / name, *words],
            cwd=self.files,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def containers(self) -> list[str]:
        """Names of the running containers of stages."""
        listed = run("docker", "ps", "--filter", f"name={self.project}-", "--format", "{{.Names}}").stdout
        return [name for name in listed.split() if "-s3-" not in name]

    @property
    def server(self) -> str:
        """Name of the server's container."""
        return f"{self.project}-s3-1"


@pytest.fixture(scope="session")
def lab(images: dict[str, str], s3_image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    work = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "compose", work / "compose", ignore=shutil.ignore_patterns("secrets"))
    files = work / "files"
    files.mkdir()
    for folder in (*files.parents[:3], files):  # pytest makes them for their owner alone
        folder.chmod(0o755)
    project = f"tunemill-test-{uuid.uuid4().hex[:8]}"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TUNEMILL_"))},
        "COMPOSE_PROJECT_NAME": project,
        "COMPOSE_OVERLAY": str(HERE / "ceph.yaml"),
        "S3_IMAGE": s3_image,
        "REGISTRY": "tunemill",
        "TAG": TAG,
        "STORE_PORT": str(free_port()),
    }
    lab = Lab(project, work / "compose", files, environment)
    try:
        lab.script("up.sh")
        yield lab
    finally:
        lab.script("down.sh", "--volumes", check=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ancestors(tree: dict[str, object]) -> dict[str, dict[str, object]]:
    """Every artifact of a lineage by the stage that made it."""
    found = {str(tree["stage"]): tree}
    for child in tree["inputs"]:  # type: ignore[attr-defined]
        found = ancestors(child) | found
    return found


def inspect(image: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(run("docker", "image", "inspect", image).stdout)[0]
    return found


@functools.cache  # reading a gigabyte takes seconds, and several tests look at it
def files_in(image: str) -> tuple[tarfile.TarInfo, ...]:
    """What an image's file system holds."""
    container = run("docker", "create", image).stdout.strip()
    try:
        with (
            subprocess.Popen(["docker", "export", container], stdout=subprocess.PIPE) as exported,
            tarfile.open(fileobj=exported.stdout, mode="r|") as tree,
        ):
            return tuple(tree)
    finally:
        run("docker", "rm", container)

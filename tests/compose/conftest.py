"""A lab of its own for each test: a copy of compose/, a project name, images that report what they see.

The images hold nothing but busybox and a script named tunemill, so these tests cost seconds. What
the real images do in the lab is tested in tests/images.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ("prepare", "train", "merge", "convert", "quantize", "infer", "store")
APPLETS = (
    "sh",
    "cat",
    "id",
    "mv",
    "true",
    "sleep",
    "touch",
    "env",
    "httpd",
    "wget",
    "tar",
    "mkdir",
    "echo",
    "sed",
    "cp",
)
PROGRAM = """#!/bin/sh
case "$*" in
    "store create"*) echo "$TUNEMILL_STORE" ;;
    "store doctor"*) [ "$AWS_DEFAULT_REGION" != unfit ] || { echo "tunemill: not fit" >&2; exit 78; } ;;
    "store pull"*) mkdir /tmp/report; echo "<p>$3" >/tmp/report/report.html ;;
    evaluate*) echo "arguments $*" >&2; echo "tiny-stdlib/report-${*##*quant=}@sha256:0" ;;
    *code=*) exit "${*##*code=}" ;;
    *wait*) trap 'echo stopped >&2; exit 143' TERM; trap 'echo interrupted >&2; exit 130' INT
        echo ready; while :; do sleep 0.1; done ;;
    *) echo "$*" | sed 's/^/arguments /'; id -u; cat /run/secrets/*; env
        touch /work/written && echo "work is writable"; touch /written 2>&1; cat /files/mine.yaml ;;
esac
"""
SERVER = """
services:
  s3:
    image: {image}
    entrypoint: [sh, -c, "cp /run/secrets/credentials /data/ready && exec httpd -f -p 7070 -h /data"]
    healthcheck: {{test: [CMD, wget, -q, -O, /dev/null, "http://127.0.0.1:7070/ready"], interval: 1s}}
"""


def answer(*command: str) -> str | None:
    """What a command prints, or None when it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@pytest.fixture(scope="session")
def client() -> None:
    if answer("docker", "compose", "version") is None:
        pytest.skip("no docker client with Compose v2 here")


@pytest.fixture(scope="session")
def engine(client: None) -> None:
    if answer("docker", "version", "--format", "{{.Server.Version}}") is None:
        pytest.skip("no Docker engine answers")


@dataclass
class Lab:
    """A copy of compose/ and the environment that keeps it apart from any other."""

    folder: Path
    files: Path
    """Where the scripts are called."""
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, script: str, *words: str) -> list[str]:
        return [str(self.folder / script), *words]

    def run(self, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(script, *words),
            cwd=self.files,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command("run.sh", *words),
            cwd=self.files,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def config(self, *overlays: str, **environment: str) -> str:
        files = [word for name in ("compose.yaml", *overlays) for word in ("-f", str(self.folder / name))]
        return subprocess.run(
            ["docker", "compose", *files, "--profile", "*", "config", "--format", "json"],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    @property
    def containers(self) -> list[str]:
        """Names of this lab's stage containers, running or not."""
        project = self.environment["COMPOSE_PROJECT_NAME"]
        names = answer("docker", "ps", "-a", "--format", "{{.Names}}", "--filter", f"name=^{project}-")
        return [name for name in (names or "").split() if not name.startswith(f"{project}-s3-")]


def clean_environment() -> dict[str, str]:
    """This process's environment without what would reach into the lab."""
    own = re.compile(r"AWS_|STORE|TUNEMILL|COMPOSE_|GPU|REGISTRY$|TAG$|S3_IMAGE|MAKE")
    return {name: value for name, value in os.environ.items() if not own.match(name)}


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A lab that nothing is running in, and without keys."""
    return new_lab(tmp_path)


def new_lab(place: Path) -> Lab:
    folder = place / "compose"
    shutil.copytree(ROOT / "compose", folder, ignore=shutil.ignore_patterns("secrets"))
    files = place / "files"
    files.mkdir(mode=0o755)
    name = f"tunemill-test-{uuid.uuid4().hex[:8]}"
    return Lab(folder, files, clean_environment() | {"COMPOSE_PROJECT_NAME": name})


@pytest.fixture(scope="session")
def tag(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The tag of images tunemill/… that report what they see."""
    busybox = static_busybox(tmp_path_factory.mktemp("busybox"))
    tree = tmp_path_factory.mktemp("tree")
    (tree / "bin").mkdir()
    shutil.copy(busybox, tree / "bin/busybox")
    for name in APPLETS:
        (tree / "bin" / name).symlink_to("busybox")
    (tree / "bin/tunemill").write_text(PROGRAM)
    (tree / "bin/tunemill").chmod(0o755)
    for name in ("work", "tmp"):
        (tree / name).mkdir()
    archive = tree.parent / "tree.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(tree, ".", filter=owned_as_in_the_images)
    tag = f"test-{uuid.uuid4().hex[:8]}"
    settings = ("USER 65532:65532", 'ENTRYPOINT ["tunemill"]', "ENV PATH=/bin", "ENV HOME=/work")
    changes = [word for setting in settings for word in ("-c", setting)]
    subprocess.run(["docker", "import", *changes, archive, f"tunemill/store:{tag}"], check=True)
    names = [f"tunemill/{image}:{tag}" for image in IMAGES]
    for name in names[:-1]:
        subprocess.run(["docker", "tag", names[-1], name], check=True)
    yield tag
    subprocess.run(["docker", "rmi", *names], capture_output=True, check=False)


def owned_as_in_the_images(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 65532 if member.name == "./work" else 0
    member.mode = 0o1777 if member.name == "./tmp" else 0o755
    return member


def static_busybox(folder: Path) -> Path:
    """Debian's statically linked one; the machine's own is usually not."""
    if sys.platform != "linux" or shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("the images of these tests are made from Debian's busybox-static")
    folder.chmod(0o777)  # apt downloads as a user of its own
    subprocess.run(
        ["apt-get", "download", "-qq", "busybox-static"], cwd=folder, capture_output=True, check=False
    )
    found = list(folder.glob("busybox-static_*.deb"))
    if not found:
        pytest.skip("apt-get cannot download busybox-static: run apt-get update")
    subprocess.run(["dpkg-deb", "-x", found[0], folder], check=True)
    return folder / "bin/busybox"


@contextmanager
def with_images(lab: Lab, tag: str) -> Iterator[Lab]:
    """Give a lab the images, one of them as its server; in the end nothing of it is left in the engine."""
    overlay = lab.folder / "test.yaml"
    overlay.write_text(SERVER.format(image=f"tunemill/store:{tag}"))
    lab.environment |= {"TAG": tag, "COMPOSE_OVERLAY": str(overlay), "STORE_PORT": str(free_port())}
    (lab.files / "mine.yaml").write_text("learning_rate: 1\n")
    try:
        yield lab
    finally:
        lab.run("down.sh", "--volumes", "--timeout", "1")
        lab.run("down.sh", "--volumes", STORE_ENDPOINT="http://192.0.2.1")


@pytest.fixture
def images(lab: Lab, tag: str) -> Iterator[Lab]:
    """A lab whose images are there, and that was never up."""
    with with_images(lab, tag) as ready:
        yield ready


@pytest.fixture(scope="session")
def up(tag: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A lab whose store is up, for tests that leave it so; starting one takes seconds."""
    with with_images(new_lab(tmp_path_factory.mktemp("up")), tag) as ready:
        done = ready.run("up.sh")
        assert done.returncode == 0, done.stderr
        yield ready


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def lines(text: str) -> Sequence[str]:
    return text.strip().splitlines()

"""What can be wrong before a stage starts is one line with what to do, and the documented exit code."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from .conftest import Lab, answer, lines


def refused(lab: Lab, *words: str, code: int, **environment: str) -> str:
    done = lab.run("run.sh", *words, **environment)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    (line,) = lines(done.stderr)
    assert line.startswith("compose: ")
    return line


def test_an_unknown_stage(lab: Lab) -> None:
    assert "quantize" in refused(lab, "quantise", code=2)
    assert "fetch" in refused(lab, code=2)


def test_a_directory_is_no_store_for_containers(lab: Lab) -> None:
    assert "s3://bucket" in refused(lab, "train", code=2, STORE=".tunemill/store")


def test_no_docker(lab: Lab, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "tail"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    assert "install Docker" in refused(lab, "train", code=78, PATH=str(tools))


@pytest.mark.usefixtures("client")
def test_no_engine(lab: Lab) -> None:
    line = refused(lab, "train", code=78, DOCKER_HOST="unix:///nonexistent/docker.sock")
    assert "no Docker engine answers" in line
    assert "/nonexistent/docker.sock" in line
    assert lab.run("up.sh", DOCKER_HOST="unix:///nonexistent/docker.sock").returncode == 78


@pytest.mark.docker
@pytest.mark.usefixtures("engine")
def test_no_compose(lab: Lab, tmp_path: Path) -> None:
    plugins = json.loads(answer("docker", "info", "--format", "{{json .ClientInfo.Plugins}}") or "[]")
    own = os.environ.get("DOCKER_CONFIG", str(Path.home() / ".docker"))
    if any(each["Name"] == "compose" and not each["Path"].startswith(own) for each in plugins or []):
        pytest.skip("Compose is installed for everybody here, so it cannot be taken away")
    host = answer("docker", "context", "inspect", "--format", "{{.Endpoints.docker.Host}}") or ""
    settings = {"DOCKER_CONFIG": str(tmp_path), "DOCKER_HOST": host}
    assert "Compose v2" in refused(lab, "train", code=78, **settings)


@pytest.mark.docker
@pytest.mark.usefixtures("engine")
def test_no_image_of_our_own_and_none_is_looked_for_elsewhere(lab: Lab) -> None:
    assert "make images" in refused(lab, "train", code=78, TAG="none-such")
    assert "make images" in refused(lab, "train", code=78, TAG="none-such", REGISTRY="somebody")


@pytest.mark.docker
@pytest.mark.usefixtures("engine")
def test_an_image_that_cannot_be_pulled(lab: Lab) -> None:
    line = refused(lab, "train", code=78, REGISTRY="127.0.0.1:1/lab")
    assert "127.0.0.1:1/lab/train" in line
    assert "cannot be pulled" in line


@pytest.mark.docker
def test_no_keys(images: Lab) -> None:
    assert "make up" in refused(images, "train", code=78)


@pytest.mark.docker
def test_a_store_that_is_down(images: Lab) -> None:
    images.run("secrets.sh")
    assert "make up" in refused(images, "train", code=75)


@pytest.mark.docker
def test_no_keys_for_a_store_of_ones_own(images: Lab, tmp_path: Path) -> None:
    settings = {"STORE_ENDPOINT": "http://192.0.2.1", "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none")}
    assert "AWS_SHARED_CREDENTIALS_FILE" in refused(images, "train", code=78, **settings)


@pytest.mark.docker
def test_no_gpu_in_the_engine(up: Lab, tag: str) -> None:
    runtimes = answer("docker", "info", "--format", "{{json .Runtimes}}") or ""
    if "nvidia" in runtimes:
        pytest.skip("this engine has a GPU runtime")
    answer("docker", "tag", f"tunemill/train:{tag}", f"tunemill/train:{tag}-cuda")
    try:
        assert "NVIDIA Container Toolkit" in refused(up, "train", code=78, GPU="1")
        assert up.run("run.sh", "merge", GPU="1").returncode == 0
    finally:
        answer("docker", "rmi", f"tunemill/train:{tag}-cuda")


@pytest.mark.docker
def test_a_directory_that_the_containers_may_not_read(up: Lab) -> None:
    closed = up.files / "closed"
    closed.mkdir(mode=0o700)
    assert "chmod o+rx" in refused(up, "train", code=78, TUNEMILL_FILES=str(closed))

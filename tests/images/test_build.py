"""What the images are: small, without compilers and secrets, described, and each for its own stages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tunemill import __version__
from tunemill.image import IMAGES as STAGES

from .conftest import IMAGES, ROOT, SECRET, files_in, inspect, run

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]

# Bytes, uncompressed, as `docker image ls` shows them; docs/images.md says what each is made of.
CHECKOV = "3.3.30"
LIMITS = {"merge": 1e9, "convert": 1e9, "quantize": 300e6, "infer": 1e9, "store": 300e6}
CONFINED = (
    "--rm",
    "--read-only",
    "--network",
    "none",
    "--cap-drop",
    "ALL",
    "--security-opt",
    "no-new-privileges",
)


@pytest.mark.parametrize("name", IMAGES)
def test_help_and_version_need_nothing(images: dict[str, str], name: str) -> None:
    version = run("docker", "run", *CONFINED, images[name], "--version").stdout
    assert version.strip() == f"tunemill, version {__version__}"
    shown = run("docker", "run", *CONFINED, images[name], "--help").stdout
    assert f"Usage: tunemill {name} " in shown if name in STAGES.values() else "Usage: tunemill" in shown


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_described_and_runs_as_nobody(images: dict[str, str], name: str) -> None:
    config = inspect(images[name])["Config"]
    assert isinstance(config, dict)
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["tunemill"]
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert labels["source"] == "https://example.org/tunemill"
    assert labels["revision"] == "0" * 40
    assert labels["version"] == "test"
    assert labels["licenses"] == "Apache-2.0"


@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_sizes(images: dict[str, str], name: str, limit: float) -> None:
    size = inspect(images[name])["Size"]
    assert isinstance(size, int)
    assert size < limit, f"{name} has {size / 1e6:.0f} MB"


def test_infer_travels_in_less_than_300_mb(images: dict[str, str], tmp_path: Path) -> None:
    packed = 0
    with subprocess.Popen(["docker", "save", images["infer"]], stdout=subprocess.PIPE) as saved:
        assert saved.stdout
        compressor = zlib.compressobj(6)
        while block := saved.stdout.read(1 << 20):
            packed += len(compressor.compress(block))
    assert 0 < packed < 300e6, f"{packed / 1e6:.0f} MB"


@pytest.mark.parametrize("name", IMAGES)
def test_nothing_is_left_of_building(images: dict[str, str], name: str) -> None:
    paths = [member.name for member in files_in(images[name])]
    assert "opt/venv/bin/python" in paths
    left = re.compile(
        r"bin/(gcc|g\+\+|cc1plus|cmake|ninja|pip3?|conda)$|/site-packages/pip/|/\.cache/|^root/\.(?!bashrc|profile)"
        r"|(site-packages|opt/torch)/(numpy|scipy|sklearn|pyarrow|pandas|torch)/(.+/)?tests?/|^var/lib/apt/lists/.+_Packages"
    )
    assert [path for path in paths if left.search(path)] == []
    writable = [m.name for m in files_in(images[name]) if m.isreg() and m.mode & 0o002]
    assert writable == []


@pytest.mark.parametrize("name", ["quantize", "infer", "store"])
def test_no_torch_where_none_is_needed(images: dict[str, str], name: str) -> None:
    assert not [member.name for member in files_in(images[name]) if "libtorch" in member.name]


@pytest.mark.parametrize("name", IMAGES)
def test_no_secret_in_the_history(images: dict[str, str], name: str) -> None:
    history = run("docker", "history", "--no-trunc", images[name]).stdout
    assert "tunemill" in history
    assert SECRET not in history
    assert SECRET not in json.dumps(inspect(images[name]))
    assert not [m.name for m in files_in(images[name]) if m.name.startswith("run/secrets/")]


@pytest.mark.parametrize("name", IMAGES)
def test_the_bill_of_materials(images: dict[str, str], name: str) -> None:
    read = (
        "docker",
        "run",
        *CONFINED,
        "--entrypoint",
        "/bin/cat",
        images[name],
        "/usr/share/sbom/tunemill.cdx.json",
    )
    text = run(*read).stdout
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    parts = {part["name"]: part["version"] for part in bill["components"]}
    assert parts["tunemill"] == __version__
    assert "libc6" in parts
    assert bill["metadata"]["component"]["name"] == f"tunemill/{name}"
    assert ("torch" in parts) == (name in ("prepare", "train", "merge", "convert"))
    assert ("llama_cpp_python" in parts or "llama-cpp-python" in parts) == (
        name in ("train", "convert", "quantize", "infer")
    )
    lock = (ROOT / f"images/locks/{name}.txt").read_text()
    locked: dict[str, set[str]] = {}  # some differ by Python's version
    for package, version in re.findall(r"^([\w.-]+)==([^ ;\\]+)", lock, re.MULTILINE):
        locked.setdefault(package, set()).add(version)
    python = [part for part in bill["components"] if part.get("purl", "").startswith("pkg:pypi/")]
    named = {part["name"].lower().replace("_", "-"): part["version"] for part in python}
    assert {
        name for name, versions in locked.items() if named.get(name, min(versions)) not in versions
    } == set()
    assert len(locked.keys() & named.keys()) > len(locked) * 0.8


@pytest.mark.parametrize(("stage", "image"), STAGES.items())
def test_an_image_refuses_the_stages_of_others(images: dict[str, str], stage: str, image: str) -> None:
    other = "merge" if image != "merge" else "store"
    done = run("docker", "run", *CONFINED, images[other], stage, "--model", "tiny", check=False)
    assert done.returncode == 2
    assert (
        done.stderr == f"tunemill: this is the image of {other}; '{stage}' needs the image tunemill/{image}\n"
    )


def test_the_best_code_for_the_processor_is_taken(images: dict[str, str]) -> None:
    code = "from tunemill.llama import *; print(build_of(load_llama())['system_info'])"
    told = run("docker", "run", *CONFINED, "--entrypoint", "python", images["infer"], "-c", code).stdout
    flags = Path("/proc/cpuinfo").read_text()
    assert "AVX2 = 1" in told
    assert ("AVX512_VNNI = 1" in told) == (" avx512_vnni" in flags)


def test_dockerfiles_have_no_findings() -> None:
    checks = ("--framework", "dockerfile", "secrets", "--compact", "--quiet", "--skip-download", "-o", "json")
    found = run(
        Path(sys.executable).with_name("uvx"),
        "--quiet",
        f"checkov=={CHECKOV}",
        *checks,
        "-d",
        ROOT / "images",
    )
    reports = json.loads(found.stdout)
    summaries = [report["summary"] for report in (reports if isinstance(reports, list) else [reports])]
    assert [summary["failed"] for summary in summaries] == [0] * len(summaries)
    assert sum(summary["passed"] for summary in summaries) > 100

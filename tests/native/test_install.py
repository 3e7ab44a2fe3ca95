"""``images/native/install.sh`` on this machine: installed for real, killed, run again, and refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from counting import ROWS, save_data, save_model

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "images/native/install.sh"
TOOLS = (
    "bash",
    "dirname",
    "uname",
    "sed",
    "head",
    "tail",
    "cut",
    "grep",
    "ls",
    "cat",
    "mkdir",
    "touch",
    "env",
)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A PATH with the shell's usual tools, without Python, compiler or GPU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found
        (folder / name).symlink_to(found)
    return folder


def stub(folder: Path, name: str, text: str, code: int = 0) -> None:
    """Let a program say something; for machines that cannot be had here."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text(f"#!{shutil.which('bash')}\necho '{text}'\nexit {code}\n")
    (folder / name).chmod(0o755)


def call(bare: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(bare), "HOME": str(bare)}
    return subprocess.run(
        [SCRIPT, *words], cwd=bare.parent, env=environment, capture_output=True, text=True, check=False
    )


def assert_refused(done: subprocess.CompletedProcess[str], code: int, reason: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("install.sh: ")
    assert done.stderr.count("\n") == 1
    assert reason in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        pytest.param(("--prefix",), 2, "--prefix needs a value", id="no value"),
        pytest.param(("--fast",), 2, "unknown argument '--fast'", id="unknown option"),
        pytest.param(("--backend", "tpu"), 2, "expected auto, metal, cuda or cpu", id="unknown backend"),
        pytest.param(("--backend", "metal"), 78, "Metal needs macOS on Apple silicon", id="no Mac"),
        pytest.param(("--backend", "cuda"), 78, "nvidia-smi shows no GPU", id="no GPU"),
        pytest.param((), 78, "no Python 3.11 or newer with venv was found: apt-get", id="no Python"),
    ],
)
def test_what_is_missing_is_one_line(bare: Path, words: tuple[str, ...], code: int, reason: str) -> None:
    assert_refused(call(bare, *words), code, reason)
    assert not (bare.parent / ".venv-native").exists()


def test_an_old_python_is_not_taken(bare: Path) -> None:
    stub(bare, "python3", "", code=1)
    assert_refused(call(bare), 78, "no Python 3.11 or newer")


def test_a_gpu_without_its_compiler_is_not_passed_over_in_silence(bare: Path) -> None:
    stub(bare, "nvidia-smi", "NVIDIA H200")
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        assert "backend: cpu (install the CUDA toolkit to use the GPU" in call(bare).stdout
        assert_refused(call(bare, "--backend", "cuda"), 78, "there is no nvcc")
    stub(bare, "nvcc", "")
    assert "backend: cuda\n" in call(bare).stdout


def test_a_mac_gets_metal(bare: Path) -> None:
    """What follows on a real Mac cannot be run here."""
    stub(bare, "sysctl", "Apple M2 Pro")
    (bare / "uname").unlink()
    (bare / "uname").write_text(f"#!{shutil.which('bash')}\n[ $1 = -s ] && echo Darwin || echo arm64\n")
    (bare / "uname").chmod(0o755)
    done = call(bare)
    assert done.stdout == "system: Darwin arm64, Apple M2 Pro\nbackend: metal\n"
    assert_refused(done, 78, "brew install python")
    stub(bare, "python3", "Python 3.13.1")
    assert_refused(call(bare), 78, "there is no C++ compiler to build llama.cpp with: xcode-select --install")


def test_a_folder_of_others_is_left_alone(bare: Path) -> None:
    stub(bare, "python3", "Python 3.13.1")
    stub(bare, "c++", "c++ 14")
    (bare.parent / "thesis").mkdir()
    (bare.parent / "thesis/chapter.tex").write_text("")
    assert_refused(call(bare, "--prefix", "thesis"), 78, "thesis is there already and no virtual environment")
    assert os.listdir(bare.parent / "thesis") == ["chapter.tex"]


def test_a_step_that_fails_is_one_line_and_leaves_its_log(bare: Path) -> None:
    stub(bare, "python3", "Error: no room for an environment", code=0)
    stub(bare, "c++", "c++ 14")
    done = call(bare, "--prefix", "new")
    assert_refused(done, 78, "install.log")
    assert (bare.parent / "new/install.log").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # without pip's cache llama.cpp is compiled
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_it_installs_what_quantizes_and_infers(tmp_path: Path) -> None:
    """Killed twice on the way; then whole; then again, keeping what is done."""
    prefix = tmp_path / "here"
    words = [str(SCRIPT), "--prefix", str(prefix), "--backend", "cpu"]
    for seconds in (2, 12):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines[:5]] == [
        *("system", "backend", "Python", "compiler", "environment")
    ]
    assert lines[-2].startswith("cpu: llama-cpp-python ")
    assert "counted right on" in lines[-2]
    assert lines[-1] == f"ready: {prefix}/bin/tunemill"
    assert not list(prefix.glob("lib/python*/site-packages/torch")), "neither stage needs it"
    classify(prefix / "bin/tunemill", tmp_path)
    built = (prefix / "llama.built").stat().st_mtime_ns
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "compiling" not in again.stdout
    assert (prefix / "llama.built").stat().st_mtime_ns == built


def classify(tunemill: Path, folder: Path) -> None:
    """Quantize, infer and evaluate with the installed program, and look at the result."""
    save_model(folder / "model")
    save_data(folder / "data")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TUNEMILL_")}
    environment |= {"TUNEMILL_STORE": str(folder / "store"), "TUNEMILL_CACHE": str(folder / "cache")}
    for stage in (
        "store create",
        f"store push {folder}/model lab/gguf-f16 --kind gguf",
        f"store push {folder}/data lab/data --kind data",
        "quantize --run lab",
        "infer --run lab",
        "evaluate --run lab",
        "store show lab/report-q4_k_m",
    ):
        done = subprocess.run(
            [tunemill, *stage.split()], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    words = [line.split() for line in done.stdout.splitlines()]
    assert ["rows", str(len(ROWS))] in words
    assert ["accuracy", "1.0"] in words

"""A quantization is trusted on the class of host that made it: what other hosts are told, and can do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from counting import save_data, save_model, save_probes
from tunemill import stage
from tunemill.gguf.header import read_gguf
from tunemill.host import this_host
from tunemill.infer import reprove
from tunemill.store import Store, open_store

Call = Callable[..., tuple[int, str, str]]
OTHER = "TUNEMILL_OTHER_LLAMA"
ELSEWHERE = replace(this_host(), kernels=("neon",), machine="aarch64", compiler="clang-19.1.7")
QUANTIZE = ["quantize", "--run", "lab", "--set", "quant=Q4_K_M"]
INFER = ["infer", "--run", "lab"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the counting model's F16, which has a probe set, and the data of its task."""
    return make_lab(tmp_path_factory.mktemp("lab"))


def make_lab(folder: Path, sureness: float = 1) -> Path:
    """Make that store; the model's logits are multiplied by ``sureness``."""
    model, data, store = folder / "model", folder / "data", folder / "store"
    save_model(model)
    save_data(data)
    path = model / "model-F16.gguf"
    (output,) = [tensor for tensor in read_gguf(path).tensors if tensor.name == "output.weight"]
    weights = np.memmap(path, np.float16, "r+", output.start, (output.size // 2,))
    weights *= np.float16(sureness)
    weights.flush()
    save_probes(model, data, folder / "scratch")
    environment = {**os.environ, "TUNEMILL_STORE": str(store), "TUNEMILL_CACHE": str(folder / "cache")}
    for words in (
        "store create",
        f"store push {model} lab/gguf-f16 --kind gguf",
        f"store push {data} lab/data --kind data",
    ):
        run(words.split(), environment)
    return store


def run(words: list[str], environment: dict[str, str]) -> str:
    program = [sys.executable, "-m", "tunemill.cli", *words]
    done = subprocess.run(program, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def call(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: Call) -> Call:
    """Run a command on a copy of the store; returns code, stdout, stderr."""
    monkeypatch.setenv("TUNEMILL_STORE", str(shutil.copytree(lab, tmp_path / "store")))
    monkeypatch.setenv("TUNEMILL_CACHE", str(tmp_path / "cache"))
    return command_line


@pytest.fixture
def store(call: Call, tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def elsewhere(call: Call, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Quantize as another class of host."""

    def quantize(*words: str) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(stage, "this_host", lambda: ELSEWHERE)
            code, _, stderr = call(*QUANTIZE, *words)
        assert code == 0, stderr

    return quantize


def test_here_nothing_is_asked(call: Call, store: Store) -> None:
    assert call(*QUANTIZE)[0] == 0
    code, stdout, stderr = call(*INFER)
    assert code == 0, stderr
    assert "kind of host" not in stderr
    facts = store.resolve(stdout.strip()).facts
    assert facts["host_class"] == this_host().host_class
    assert "reproved" not in facts


def test_another_class_is_refused_in_one_line_that_names_both(
    call: Call, store: Store, elsewhere: Callable[..., None]
) -> None:
    elsewhere()
    before = sorted(store.names())
    for words in (INFER, [*INFER, "--dry-run"]):
        code, _, stderr = call(*words)
        assert code == 78
        (line,) = stderr.strip().splitlines()
        named = (ELSEWHERE.host_class, this_host().host_class, "lab/gguf-q4_k_m@sha256:")
        assert all(word in line for word in (*named, "--requantize", "--reprove")), line
    assert sorted(store.names()) == before


def test_the_unquantized_model_runs_anywhere(
    call: Call, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "this_host", lambda: ELSEWHERE)
    code, _, stderr = call(*INFER, "--set", "quant=F16")
    assert code == 0, stderr


def test_of_a_pushed_quantization_the_host_is_not_known(call: Call, store: Store, tmp_path: Path) -> None:
    assert call(*QUANTIZE)[0] == 0
    pulled = tmp_path / "pulled"
    assert call("store", "pull", "lab/gguf-q4_k_m", str(pulled))[0] == 0
    assert call("store", "push", str(pulled), "lab/gguf-q4_k_m", "--kind", "gguf")[0] == 0
    code, _, stderr = call(*INFER)
    assert code == 0, stderr
    assert "on which kind of host it was quantized is not known" in stderr
    assert "not known" not in call(*INFER, "--set", "quant=F16")[2]


def test_requantize_makes_the_same_here(call: Call, store: Store, elsewhere: Callable[..., None]) -> None:
    elsewhere("--set", "output_tensor_type=Q8_0")
    theirs = store.resolve("lab/gguf-q4_k_m")
    code, stdout, stderr = call(*INFER, "--requantize")
    assert code == 0, stderr
    used = store.resolve(store.provenance(store.resolve(stdout.strip())).inputs["gguf"])
    assert used.digest == store.resolve("lab/gguf-q4_k_m").digest != theirs.digest
    ours, before = store.provenance(used), store.provenance(theirs)
    assert ours.host["host_class"] == this_host().host_class
    assert ours.config == before.config
    assert ours.inputs == before.inputs
    again = call(*INFER, "--requantize")
    assert (again[0], again[1]) == (0, stdout)


def test_requantize_without_the_unquantized_model(
    call: Call, store: Store, elsewhere: Callable[..., None], tmp_path: Path
) -> None:
    elsewhere()
    gone = store.resolve("lab/gguf-f16").digest.removeprefix("sha256:")
    for path in [*(tmp_path / "store").rglob(f"*{gone}*")]:
        path.unlink()
    code, _, stderr = call(*INFER, "--requantize")
    assert code == 2
    assert stderr.strip().count("\n") == 0
    assert "gguf-f16" in stderr


def test_reprove_measures_the_file_here(call: Call, store: Store, elsewhere: Callable[..., None]) -> None:
    elsewhere()
    code, stdout, stderr = call(*INFER, "--reprove")
    assert code == 0, stderr
    assert "proved on this one by 3 prompts" in stderr
    made = store.resolve(stdout.strip())
    assert made.facts["reproved"]["quantized_on"] == ELSEWHERE.host_class
    assert made.facts["reproved"]["mean_kl"] < 1e-3
    assert made.facts["reproved"]["flips"] == 0
    assert made.facts["host_class"] == this_host().host_class
    assert store.provenance(made).config["reprove"] is True


def test_reprove_stops_what_answers_otherwise(
    call: Call, elsewhere: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere()
    monkeypatch.setattr(reprove, "LIMITS", replace(reprove.LIMITS, min_top1=1.01))
    code, _, stderr = call(*INFER, "--reprove")
    assert code == 78
    assert "top-1 agreement" in stderr
    assert "--requantize" in stderr


def test_reprove_without_probes(call: Call, elsewhere: Callable[..., None], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    save_model(bare)
    assert call("store", "push", str(bare), "lab/gguf-f16", "--kind", "gguf")[0] == 0
    elsewhere()
    code, _, stderr = call(*INFER, "--reprove")
    assert code == 78
    assert "has no probes.json to be proved by" in stderr


def test_two_builds_of_llama_cpp(call: Call, store: Store, tmp_path: Path) -> None:
    """The same file on two builds for one processor: another class, and within the limits."""
    other = os.environ.get(OTHER)
    if not other:
        pytest.skip(f"{OTHER} names no folder with a llama.cpp that was compiled otherwise")
    run(QUANTIZE, {**os.environ, "LLAMA_CPP_LIB_PATH": other})
    made = store.provenance(store.resolve("lab/gguf-q4_k_m"))
    assert made.host["host_class"] != this_host().host_class
    assert call(*INFER)[0] == 78
    code, stdout, stderr = call(*INFER, "--reprove")
    assert code == 0, stderr
    assert store.resolve(stdout.strip()).facts["reproved"]["mean_kl"] < 1e-3
    assert call(*INFER, "--requantize")[0] == 0


def test_diff_of_two_quantizations_names_tensors_and_labels(call: Call, store: Store) -> None:
    """Another type for two tensors stands for whatever makes a class of host round otherwise."""
    assert call(*QUANTIZE)[0] == 0
    plain = store.resolve("lab/gguf-q4_k_m")
    assert call(*QUANTIZE, "--set", "tensor_type=[blk.1.ffn_up=Q3_K, blk.0.attn_q=Q5_K]")[0] == 0
    code, stdout, stderr = call("store", "diff", plain.reference, "lab/gguf-q4_k_m")
    assert code == 0, stderr
    assert "  config tensor_type: (absent) -> " in stdout
    lines = stdout.splitlines()
    (summary,) = [line for line in lines if line.startswith("tensors: ")]
    assert summary.startswith("tensors: 2 of 21 differ, most in blk.1.ffn_up.weight: 0.0")
    assert [line.split(", at most")[0] for line in lines if line.startswith("  tensor ")] == [
        "  tensor blk.0.attn_q.weight: Q4_K -> Q5_K",
        "  tensor blk.1.ffn_up.weight: Q4_K -> Q3_K",
    ]
    (labels,) = [line for line in lines if line.startswith("labels: ")]
    assert labels.startswith("labels: 0 of 3 labels flip; mean KL ")
    code, stdout, _ = call("store", "diff", plain.reference, "lab/gguf-q4_k_m", "--json")
    found = json.loads(stdout)
    assert [each["name"] for each in found["tensors"]["differing"]] == [
        "blk.0.attn_q.weight",
        "blk.1.ffn_up.weight",
    ]
    assert 0 < found["tensors"]["differing"][0]["largest"] < found["tensors"]["worst"]["largest"] < 0.2
    assert found["parity"]["labels"]["flips"] == 0


def test_diff_of_what_has_no_probes_says_so(call: Call, store: Store, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    save_model(bare)
    assert call("store", "push", str(bare), "bare/gguf-f16", "--kind", "gguf")[0] == 0
    assert call(*QUANTIZE)[0] == 0
    code, stdout, _ = call("store", "diff", "bare/gguf-f16", "lab/gguf-q4_k_m")
    assert code == 0
    assert "labels: not compared, not both have a probe set" in stdout
    assert "tensor blk.0.attn_q.weight: F16 -> Q4_K, at most 0." in stdout


def test_diff_of_two_builds(call: Call, store: Store) -> None:
    other = os.environ.get(OTHER)
    if not other:
        pytest.skip(f"{OTHER} names no folder with a llama.cpp that was compiled otherwise")
    run(QUANTIZE, {**os.environ, "LLAMA_CPP_LIB_PATH": other})
    theirs = store.resolve("lab/gguf-q4_k_m").reference
    assert call(*QUANTIZE)[0] == 0
    code, stdout, stderr = call("store", "diff", theirs, "lab/gguf-q4_k_m")
    assert code == 0, stderr
    assert "  host host_class: " in stdout
    rounding = {
        store.provenance(store.resolve(name)).host["rounding"] for name in (theirs, "lab/gguf-q4_k_m")
    }
    assert ("tensors: 0 of 21 differ" in stdout) is (len(rounding) == 1)
    assert "labels: 0 of 3 labels flip" in stdout

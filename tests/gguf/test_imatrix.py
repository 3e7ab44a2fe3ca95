"""Importance matrices: the numbers, the texts they are of, the file, and what they are good for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

from tunemill.gguf.calibration import choose, collect
from tunemill.gguf.config import ConvertConfig, ImatrixConfig
from tunemill.gguf.convert import convert
from tunemill.gguf.imatrix import FILE, Imatrix, read_imatrix
from tunemill.gguf.library import Library
from tunemill.progress import Progress
from tunemill.work import Input, Work

TOOL = "TUNEMILL_LLAMA_IMATRIX"


@pytest.fixture(scope="session")
def converted(made, data, converter, tmp_path_factory) -> Path:
    return converted_from(made, data, tmp_path_factory.mktemp("dense"))


def converted_from(model: Path, data: Path, folder: Path) -> Path:
    output = folder / "out"
    output.mkdir()
    inputs = {
        role: Input(f"t/{role}@sha256:0", "c" * 64, role, path, {})
        for role, path in (("merged", model), ("data", data))
    }
    convert(Work(ConvertConfig(), inputs, output, folder / "scratch", Progress(quiet=True), None))
    return output


def texts_of(directory: Path, data: Path, count: int) -> list[tuple[str, str]]:
    from tunemill.prompting import read_prompting

    prompting = read_prompting(directory)
    rows = choose(data, frozenset(), count)
    return [(prompting.prompt(r["prompt"]), prompting.completion(r["prompt"], r["completion"])) for r in rows]


def tokens_of(model: Path, texts: list[tuple[str, str]]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [
        [i for part in parts for i in tokenizer.encode(part, add_special_tokens=False)] for parts in texts
    ]


def close(ours, theirs) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=2e-2, atol=1e-2 * np.abs(theirs).max())


def test_the_sums_are_those_of_transformers(work, converted, made, data):
    """Each column's sum of squares over all tokens, as hooks on the linear layers see them."""
    import torch
    from transformers import AutoModelForCausalLM

    this = work(ImatrixConfig(imatrix_prompts=12, n_threads=1), gguf=converted, data=data)
    facts = collect(this)
    found = read_imatrix(this.output / FILE)
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    seen: dict[str, np.ndarray] = {}

    def hook(name):
        def add(_module, inputs):
            squares = inputs[0].detach().square().sum(dim=(0, 1)).double().numpy()
            seen[name] = seen.get(name, 0) + squares

        return add

    names = {"q_proj": "attn_q", "o_proj": "attn_output", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for path, module in model.named_modules():
        rest = path.split(".")[2:]
        if len(rest) == 3 and rest[2] in names:
            module.register_forward_pre_hook(hook(f"blk.{rest[0]}.{names[rest[2]]}.weight"))
    ids = tokens_of(made, texts_of(converted, data, 12))
    with torch.no_grad():
        for tokens in ids:
            model(torch.tensor([tokens]))
    assert len(seen) == 8
    for name, sums in seen.items():
        close(found.sums[name][0], sums)
    assert {float(counts[0]) for counts in found.counts.values()} == {float(sum(map(len, ids)))}
    assert len(found.sums) == facts["entries"] == 14
    assert facts["texts"] == 12
    assert facts["tokens"] == sum(map(len, ids))
    assert facts["cut"] == 0
    assert facts["experts_unseen"] == {}
    assert found.datasets == ("t/data@sha256:" + "a" * 64,)
    assert (found.chunks, found.chunk_size) == (12, 512)


@pytest.fixture(scope="session")
def experts(made, data, converter, tmp_path_factory) -> tuple[Path, Path]:
    """A mixture of four experts, two for each token, as transformers' model and as a GGUF."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("experts")
    model = Path(shutil.copytree(made, folder / "model"))
    config = json.loads((made / "config.json").read_text())
    torch.manual_seed(5)
    shape = MixtralConfig(
        vocab_size=config["vocab_size"],
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    for stale in model.glob("*.safetensors"):
        stale.unlink()
    MixtralForCausalLM(shape).to(torch.bfloat16).save_pretrained(model)
    return model, converted_from(model, data, folder)


def test_experts_are_counted_each_for_itself(work, experts, data):
    import torch
    from transformers import AutoModelForCausalLM

    directory, gguf = experts
    this = work(ImatrixConfig(imatrix_prompts=8, n_threads=1), gguf=gguf, data=data)
    collect(this)
    found = read_imatrix(this.output / FILE)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    counts, sums = np.zeros(4), np.zeros((4, 256))

    def add(module, inputs, output):
        numbers = inputs[0].reshape(-1, 256)
        chosen = (numbers @ model.model.layers[0].mlp.gate.weight.T).topk(2, dim=1).indices
        for expert in range(4):
            routed = numbers[(chosen == expert).any(dim=1)]
            counts[expert] += len(routed)
            sums[expert] += routed.square().sum(dim=0).double().numpy()

    model.model.layers[0].mlp.register_forward_hook(add)
    ids = tokens_of(directory, texts_of(gguf, data, 8))
    with torch.no_grad():
        for tokens in ids:
            model(torch.tensor([tokens]))
    name = "blk.0.ffn_gate_exps.weight"
    assert found.sums[name].shape == (4, 256)
    assert counts.sum() == 2 * sum(map(len, ids)) == found.counts[name].sum()
    np.testing.assert_allclose(found.counts[name], counts, atol=2)  # a near tie may go either way
    close(found.sums[name], sums)
    assert found.counts["blk.0.ffn_down_exps.weight"].tolist() == found.counts[name].tolist()
    assert found.counts["blk.0.attn_q.weight"].tolist() == [sum(map(len, ids))]


def test_llama_cpps_own_tool_finds_the_same(converted, data, tmp_path):
    """On one text that is cut as it cuts: into chunks of equal length, each with BOS put first."""
    tool = os.environ.get(TOOL)
    if not tool:
        pytest.skip(f"{TOOL} names no llama-imatrix built from the same source")
    prompts = texts_of(converted, data, 40)
    text = " ".join(prompt.removeprefix("<s>") for prompt, _ in prompts)
    (tmp_path / "text.txt").write_text(text)
    command = [tool, "-m", str(converted / "model-F16.gguf"), "-f", str(tmp_path / "text.txt")]
    command += ["-o", str(tmp_path / "theirs.gguf"), "-c", "64", "-b", "64", "--chunks", "6", "-t", "1"]
    subprocess.run([*command, "--parse-special", "--no-ppl"], check=True, capture_output=True, timeout=300)
    theirs = read_imatrix(tmp_path / "theirs.gguf")
    library = Library(tmp_path / "scratch", threading.Event())
    ids = library.tokenize(converted / "model-F16.gguf", ["<s>" + text]).value["ids"][0]
    pieces = [[1, *ids[start + 1 : start + 64]] for start in range(0, 6 * 64, 64)]
    ours = collected(converted / "model-F16.gguf", pieces, tmp_path / "ours.gguf")
    assert ours.sums.keys() == theirs.sums.keys()
    for name in theirs.sums:
        assert ours.counts[name].tolist() == theirs.counts[name].tolist()
        np.testing.assert_allclose(ours.sums[name], theirs.sums[name], rtol=1e-3)


def collected(model: Path, pieces: list[list[int]], target: Path) -> Imatrix:
    """Let a child read token ids, as the worker does after it has tokenized."""
    program = (
        "import json, sys, pathlib\n"
        "from tunemill.gguf import activations, worker\n"
        "llama = worker._library()\n"
        "settings = activations.Settings(64, 1, 'x')\n"
        "model = worker._model(llama, sys.argv[1], vocab_only=False)\n"
        "activations.collect(llama, model, json.loads(sys.argv[2]), pathlib.Path(sys.argv[3]), settings)\n"
    )
    import sys

    command = [sys.executable, "-c", program, str(model), json.dumps(pieces), str(target)]
    subprocess.run(command, check=True, capture_output=True)
    return read_imatrix(target)

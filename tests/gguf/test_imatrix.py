"""Importance matrices: the numbers, the texts they are of, the file, and what they are good for."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tunemill.errors import BadDataError
from tunemill.gguf.calibration import choose, collect
from tunemill.gguf.config import ImatrixConfig, QuantizeConfig
from tunemill.gguf.header import read_gguf
from tunemill.gguf.imatrix import FILE, Imatrix, read_imatrix, write_imatrix
from tunemill.gguf.library import Library
from tunemill.gguf.quantize import quantize
from tunemill.gguf.tokens import read_rows
from tunemill.gguf.types import file_type
from tunemill.gguf.writer import write_gguf
from tunemill.parity.compare import compare
from tunemill.parity.probes import Rendering
from tunemill.parity.probes import choose as choose_probes
from tunemill.prompting import read_prompting

from .conftest import WORDS, converted_from, save_split

TOOL = "TUNEMILL_LLAMA_IMATRIX"


def texts_of(directory: Path, data: Path, count: int) -> list[tuple[str, str]]:
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


PROGRAM = """
import json, os, pathlib, sys
from tunemill.gguf import activations, worker
model, pieces, target, killed_after = sys.argv[1:]
llama = worker._library()
activations.SAVE_SECONDS = 0
save = activations._save
def then_die(collector, path, done):
    save(collector, path, done)
    if done == int(killed_after):
        os.kill(os.getpid(), 9)
activations._save = then_die
loaded = worker._model(llama, model, vocab_only=False)
settings = activations.Settings(64, 1, "x")
activations.collect(llama, loaded, json.loads(pieces), pathlib.Path(target), settings)
"""


def collected(model: Path, pieces: list[list[int]], target: Path, killed_after: int = 0) -> Imatrix | None:
    """Let a child read token ids, as the worker does after it has tokenized."""
    command = [sys.executable, "-c", PROGRAM, str(model), json.dumps(pieces), str(target), str(killed_after)]
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode == (-9 if killed_after else 0), done.stderr
    return None if killed_after else read_imatrix(target)


def test_a_file_of_ours_is_read_as_it_was_written(tmp_path):
    sums = {"blk.0.b.weight": np.array([[1.0, 4.0], [9.0, 0.0]]), "blk.0.a.weight": np.array([[2.0, 6.0]])}
    counts = {"blk.0.b.weight": np.array([2.0, 0.0]), "blk.0.a.weight": np.array([4.0])}
    write_imatrix(tmp_path / FILE, Imatrix(sums, counts, ("texts",), 3, 128))
    found = read_imatrix(tmp_path / FILE)
    assert (found.datasets, found.chunks, found.chunk_size) == (("texts",), 3, 128)
    assert found.importance()["blk.0.b.weight"].tolist() == [[0.5, 2.0], [1.0, 1.0]]
    assert found.importance()["blk.0.a.weight"].tolist() == [[0.5, 1.5]]
    assert found.unseen() == {"blk.0.b.weight": 1}


@pytest.mark.parametrize("counts", [{}, {"blk.0.a.weight": [np.inf]}], ids=["no-counts", "not-finite"])
def test_a_damaged_file(tmp_path, counts):
    tensors = {"blk.0.a.weight.in_sum2": np.ones((1, 4), np.float32)}
    tensors |= {f"{name}.counts": np.array(values, np.float32) for name, values in counts.items()}
    write_gguf(tmp_path / FILE, {"general.type": "imatrix"}, tensors)
    with pytest.raises(BadDataError, match=r"imatrix\.gguf is (no whole|damaged)"):
        read_imatrix(tmp_path / FILE)


def test_a_model_is_no_importance_matrix(converted):
    with pytest.raises(BadDataError, match="no importance matrix"):
        read_imatrix(converted / "model-F16.gguf")


@pytest.fixture
def rows(tmp_path):
    """Write a data artifact of training and test texts."""

    def write(train: list[str], test: list[str]) -> Path:
        folder = tmp_path / "rows"
        folder.mkdir()
        save_split(folder / "train.parquet", train)
        save_split(folder / "test.parquet", test)
        return folder

    return write


def test_texts_are_spread_over_the_training_split_alone(rows):
    data = rows([f"text {n}" for n in range(100)], ["held out"])
    assert [row["text"] for row in choose(data, frozenset(), 4)] == [
        "text 0",
        "text 25",
        "text 50",
        "text 75",
    ]
    assert len(choose(data, frozenset(), 500)) == 100
    left = choose(data, frozenset({"text 0", "text 1"}), 500)
    assert [row["text"] for row in left][:2] == ["text 2", "text 3"]


@pytest.mark.parametrize(
    "twin", ["read the file", "Read  the\tFILE "], ids=["equal", "but-for-case-and-spaces"]
)
def test_a_text_of_the_test_split_ends_it(work, converted, rows, twin):
    data = rows(["write the text", "read the file"], ["list of errors", twin])
    this = work(ImatrixConfig(n_threads=1), gguf=converted, data=data)
    with pytest.raises(BadDataError, match="train row 1 has the text of test row 1") as caught:
        collect(this)
    assert caught.value.exit_code == 65
    assert "\n" not in str(caught.value)
    assert not list(this.output.iterdir())


def test_no_training_rows_but_those_of_the_probe_set(rows):
    with pytest.raises(BadDataError, match="no training rows"):
        choose(rows(["the only one"], ["list of errors"]), frozenset({"the only one"}), 5)


def test_a_quantized_model_is_refused(work, converted, data, tmp_path):
    first = work(QuantizeConfig(quant="Q8_0"), gguf=converted)
    quantize(first)
    first.output.rename(tmp_path / "quantized")
    with pytest.raises(BadDataError, match="quantized already"):
        collect(work(ImatrixConfig(), gguf=tmp_path / "quantized", data=data))


def test_long_texts_are_cut_and_counted(work, converted, rows):
    data = rows(["read " * 60, "write"], ["list"])
    this = work(ImatrixConfig(imatrix_context=16, n_threads=1), gguf=converted, data=data)
    facts = collect(this)
    assert facts["cut"] == 1
    assert facts["tokens"] == read_imatrix(this.output / FILE).counts["blk.0.attn_q.weight"][0] < 32


def test_a_killed_run_goes_on_to_the_same_bytes(converted, tmp_path):
    """What it saved is taken up: after a kill in the middle no text is read twice, none left out."""
    model = converted / "model-F16.gguf"
    pieces = [[1, *range(10 + n, 60 + n)] for n in range(6)]
    collected(model, pieces, tmp_path / "whole.gguf")
    collected(model, pieces, tmp_path / "resumed.gguf", killed_after=3)
    assert (tmp_path / "resumed.npz").exists()
    collected(model, pieces, tmp_path / "resumed.gguf")
    assert (tmp_path / "resumed.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_held_out_divergence_is_lower_at_equal_size(trained, work, tmp_path):
    """A tiny model that learnt which word follows which, quantized with and without its matrix."""
    gguf, data, probes = trained
    library = Library(tmp_path / "library", threading.Event())
    matrix = work(ImatrixConfig(imatrix_prompts=150, n_threads=1), gguf=gguf, data=data)
    collect(matrix)
    matrix.output.rename(tmp_path / "matrix")
    reference, found, sizes = library.measure(gguf / "model-F16.gguf", probes), [], []
    for guided in ({}, {"imatrix": tmp_path / "matrix"}):
        target = tmp_path / f"{len(found)}.gguf"
        settings = {"ftype": file_type("IQ3_S"), "nthread": 1}
        path = {name: folder / FILE for name, folder in guided.items()}
        library.quantize(gguf / "model-F16.gguf", target, settings, lambda: None, **path)
        found.append(compare(probes, reference, library.measure(target, probes)).mean_kl)
        sizes.append(sum(tensor.size for tensor in read_gguf(target).tensors))
    assert sizes[0] == sizes[1]
    assert 0 < found[1] < 0.95 * found[0]


@pytest.fixture(scope="session")
def trained(made, converter, tmp_path_factory):
    """A model trained on sentences where each word suggests the next, its data, and held-out probes."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("trained")
    model, data = Path(shutil.copytree(made, folder / "model")), folder / "data"
    data.mkdir()
    save_split(data / "train.parquet", sentences(200, seed=1))
    save_split(data / "test.parquet", sentences(40, seed=2))
    gguf = converted_from(teach(model, sentences(200, seed=1)), data, folder)
    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokenize(texts):
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]

    rendering = Rendering(read_prompting(gguf), tokenize, tokenizer.vocab_size)
    held_out = [{**row, "id": str(n)} for split, n, row in read_rows(data) if split == "test"]
    return gguf, data, choose_probes(held_out, "test", [], rendering, 40)


def sentences(count: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    made = []
    for _ in range(count):
        place, words = chance.randrange(len(WORDS)), []
        for _ in range(chance.randint(6, 25)):
            words.append(WORDS[place])
            place = (place * 5 + chance.choice([1, 1, 1, 3, 7])) % len(WORDS)
        made.append(" ".join(words))
    return made


def teach(directory: Path, texts: list[str]) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    plain = {"add_special_tokens": False}
    ids = [tokenizer.encode(f"<s><|user|>{text}<|assistant|>A label</s>", **plain) for text in texts]
    optimizer, chance = torch.optim.AdamW(model.parameters(), 2e-3), random.Random(0)
    for _ in range(100):
        batch = chance.sample(ids, 8)
        longest = max(map(len, batch))
        padded = torch.tensor([tokens + [2] * (longest - len(tokens)) for tokens in batch])
        wanted = torch.tensor([tokens + [-100] * (longest - len(tokens)) for tokens in batch])
        model(padded, labels=wanted).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory

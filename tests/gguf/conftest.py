"""A small SentencePiece Llama with random weights, its task data, and Works of the gguf stages."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pieces import TEMPLATE, WORDS, sentencepiece_model, tokenizer_config
from tunemill.errors import ConfigurationError
from tunemill.gguf.source import find_source
from tunemill.progress import Progress
from tunemill.work import Input, Work


class NoCheckpoints:
    def latest(self, destination):
        return None

    def save(self, directory, step):
        raise AssertionError("these stages save no checkpoints")


@pytest.fixture
def work(tmp_path):
    def build(config, **directories) -> Work:
        output, scratch = tmp_path / "out", tmp_path / "scratch"
        output.mkdir()
        inputs = {
            role: Input(f"t/{role}@sha256:{'a' * 64}", "c" * 64, role, path, {})
            for role, path in directories.items()
        }
        return Work(config, inputs, output, scratch, Progress(quiet=True), NoCheckpoints())

    return build


@pytest.fixture(scope="session")
def converter():
    """llama.cpp's scripts; ``make test`` installs them."""
    try:
        return find_source()
    except ConfigurationError as error:
        pytest.fail(str(error))


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A model directory as Hugging Face 4 wrote it, made once; tests copy it before they change it."""
    directory = tmp_path_factory.mktemp("made") / "model"
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(sentencepiece_model())
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    save_llama(directory)
    return directory


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of so many bytes."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: int) -> Path:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
        return disk

    yield mount
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="session")
def converted(made, data, converter, tmp_path_factory) -> Path:
    """An F16 GGUF, made once."""
    return converted_from(made, data, tmp_path_factory.mktemp("converted"))


def converted_from(model: Path, data: Path, folder: Path) -> Path:
    from tunemill.gguf.config import ConvertConfig
    from tunemill.gguf.convert import convert

    output = folder / "out"
    output.mkdir()
    inputs = {
        role: Input(f"t/{role}@sha256:0", "c" * 64, role, path, {})
        for role, path in (("merged", model), ("data", data))
    }
    convert(Work(ConvertConfig(), inputs, output, folder / "scratch", Progress(quiet=True), NoCheckpoints()))
    return output


@pytest.fixture
def make_llama():
    return save_llama


@pytest.fixture
def model(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A data artifact with odd texts among the usual ones."""
    directory = tmp_path_factory.mktemp("data")
    chance = random.Random(5)
    usual = [" ".join(chance.choices(WORDS, k=chance.randint(3, 40))) for _ in range(250)]
    odd = [
        "  two leading",
        "tab\tand\n\n\nlines ",
        "naïve ☃ 😀 ﬁ 中文",
        "<|user|> in text",
        "x" * 300,
        "\u00a0.",
    ]
    save_split(directory / "train.parquet", usual[:200])
    save_split(directory / "test.parquet", usual[200:] + odd)
    return directory


def save_llama(directory: Path, **settings) -> None:
    import sentencepiece
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    shape = {
        "vocab_size": pieces.vocab_size(),
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape | settings)).to(torch.bfloat16)
    model.save_pretrained(directory)


def save_split(path: Path, texts: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"prompt": [{"role": "user", "content": text}], "completion": "A label", "text": text}
        for text in texts
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)

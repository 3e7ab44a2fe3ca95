"""A base model small enough to make in a second, and a prepare that needs no store."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tunemill.data.config import FetchConfig, PrepareConfig
from tunemill.progress import Progress
from tunemill.work import Facts, Input, Work

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, list[int], bytes]]) -> None:
    """Write a file by the format's own rules, so that tests can damage it by hand."""
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a real byte-level tokenizer and one small tensor."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=special[2:],
        chat_template=TEMPLATE,
    ).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 400}))
    write_safetensors(directory / "model.safetensors", {"weight": ("F32", [2, 2], bytes(16))})
    return directory


@pytest.fixture
def work(tmp_path: Path) -> Callable[..., Work[Any]]:
    """Make the Work of a stage, with its directories under ``tmp_path``."""

    def make(config: FetchConfig | PrepareConfig, name: str = "output", **inputs: Path) -> Work[Any]:
        output, scratch = tmp_path / name, tmp_path / "scratch"
        output.mkdir()
        scratch.mkdir(exist_ok=True)
        given = {role: Input(f"{role}@sha256:0", "0", role, path, facts={}) for role, path in inputs.items()}
        return Work(config, given, output, scratch, Progress(io.StringIO()), checkpoints=None)  # type: ignore[arg-type]

    return make


@pytest.fixture
def prepared(base: Path, work: Callable[..., Work[Any]]) -> Callable[..., tuple[Path, Facts]]:
    """Run prepare with the given configuration; return its output and facts."""
    from tunemill.data.prepare import prepare

    def run(name: str = "output", **config: Any) -> tuple[Path, Facts]:
        one = work(PrepareConfig(**config), name, base=base)
        return one.output, prepare(one)

    return run


@pytest.fixture(scope="session")
def server() -> ModuleType:
    path = Path(__file__).with_name("hub_server.py")
    spec = importlib.util.spec_from_file_location("tunemill_test_hub_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(server: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    hub, listener = server.start()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    listener.shutdown()
    listener.server_close()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 KiB, which only root on Linux can make."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here: needs root on Linux")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)

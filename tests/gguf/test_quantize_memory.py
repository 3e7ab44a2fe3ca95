"""Quantizing needs memory for a tensor, not for the model."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tunemill.files import write_json
from tunemill.gguf.child import Ended, Limits, run
from tunemill.gguf.header import read_gguf
from tunemill.gguf.selfcheck import _metadata
from tunemill.gguf.types import file_type
from tunemill.gguf.writer import write_gguf

LAYERS, WIDTH, WIDE = 24, 256, 5632
MEMORY = 128 << 20  # of which Python and the library take about half


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Llama of 200 MB with tensors of 3 MB; its numbers do not matter."""
    path = tmp_path_factory.mktemp("large") / "model-F16.gguf"
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    metadata = {**_metadata(tokens), "llama.block_count": LAYERS, "llama.feed_forward_length": WIDE}
    square, row = np.ones((WIDTH, WIDTH), np.float16), np.ones(WIDTH, np.float32)
    tensors = {"token_embd.weight": np.ones((len(tokens), WIDTH), np.float16), "output_norm.weight": row}
    for layer in range(LAYERS):
        tensors |= {f"blk.{layer}.{name}.weight": row for name in ("attn_norm", "ffn_norm")}
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors[f"blk.{layer}.{name}.weight"] = square
        for name in ("ffn_gate", "ffn_up"):
            tensors[f"blk.{layer}.{name}.weight"] = np.ones((WIDE, WIDTH), np.float16)
        tensors[f"blk.{layer}.ffn_down.weight"] = np.ones((WIDTH, WIDE), np.float16)
    write_gguf(path, metadata, tensors)
    return path


def quantized(model: Path, scratch: Path, memory: int) -> Ended:
    settings = {"ftype": file_type("Q8_0"), "nthread": 1, "max_buf_size": 1 << 30}
    request = {
        "task": "quantize",
        "source": str(model),
        "target": str(scratch / "x.gguf"),
        "settings": settings,
    }
    scratch.mkdir()
    write_json(scratch / "request.json", request)
    command = ["tunemill.gguf.worker", str(scratch / "request.json")]
    return run(command, scratch, Limits(300, memory), threading.Event())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds a process's private memory")
def test_a_model_is_quantized_in_less_memory_than_it_takes(model, tmp_path):
    assert model.stat().st_size > 1.5 * MEMORY
    ended = quantized(model, tmp_path / "enough", MEMORY)
    assert ended.code == 0, ended.log
    assert read_gguf(tmp_path / "enough/x.gguf").file_type == "Q8_0"
    assert quantized(model, tmp_path / "little", MEMORY // 16).code != 0  # the bound is in force

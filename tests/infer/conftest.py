"""A Llama small enough to make for each session, as a GGUF and as transformers' weights.

Written by the ``gguf`` package directly: what these tests prove about inference must not depend on
the conversion stage. Its vocabulary is bytes and a few pieces; its weights are random.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tunemill.infer.config import InferConfig
from tunemill.progress import Progress
from tunemill.prompting import Prompting
from tunemill.work import Input, Work

CONTEXT = 1024
LETTERS = "etaoinshrdlu"
PIECES = ["▁", *"abcdefghijklmnopqrstuvwxyz.,:", *map("".join, product(LETTERS, repeat=2))]
LABELS = ("networking", "net services", "data", "data types", "files")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
)
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


class Shape(NamedTuple):
    """What a model is made of."""

    width: int
    layers: int
    heads: int
    key_heads: int
    feed_forward: int


MICRO = Shape(64, 2, 4, 2, 128)
WIDE = Shape(256, 2, 4, 2, 256)  # K-quants go by blocks of 256


@dataclass(frozen=True)
class Micro:
    """The model in both forms."""

    gguf: Path
    """``model-F16.gguf`` in a directory with ``prompting.json``."""
    weights: Mapping[str, Any]
    """Transformers' state dict, as float32 arrays that are exact in float16."""
    vocabulary: int


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Micro:
    return _make(tmp_path_factory.mktemp("micro"), MICRO)


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Micro:
    """A model that can be quantized to any type."""
    return _make(tmp_path_factory.mktemp("wide"), WIDE)


def _make(directory: Path, shape: Shape) -> Micro:
    special = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    bytes_ = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces = [(piece, -float(rank), 1) for rank, piece in enumerate(PIECES)]
    vocabulary = [*special, *bytes_, *pieces]
    weights = _weights(np.random.default_rng(7), len(vocabulary), shape)
    _write(directory / "model-F16.gguf", vocabulary, weights, shape)
    Prompting(TEMPLATE, "<s>", "</s>", add_bos=True).save(directory)
    return Micro(directory / "model-F16.gguf", weights, len(vocabulary))


@pytest.fixture(scope="session")
def reference(micro: Micro) -> Any:
    """The same model in transformers, in float32, on one thread: the model is too small for more."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=micro.vocabulary,
        hidden_size=MICRO.width,
        intermediate_size=MICRO.feed_forward,
        num_hidden_layers=MICRO.layers,
        num_attention_heads=MICRO.heads,
        num_key_value_heads=MICRO.key_heads,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).float().eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in micro.weights.items()})
    return model


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., Path]:
    """Write a data artifact of (text, label) pairs and return its directory."""

    def write(
        rows: Sequence[tuple[str, str | None]], labels: Sequence[str] = LABELS, form: str = "label"
    ) -> Path:
        directory = tmp_path / "data"
        directory.mkdir(exist_ok=True)
        table = pyarrow.table(
            {
                "id": [f"row-{number}" for number in range(len(rows))],
                "prompt": [[{"role": "user", "content": f"which part: {text}"}] for text, _ in rows],
                "completion": [label or "" for _, label in rows],
                "text": [text for text, _ in rows],
                "label": pyarrow.array([label for _, label in rows], pyarrow.string()),
                "group": list(range(len(rows))),
            }
        )
        pyarrow.parquet.write_table(table, directory / "test.parquet")
        listed = [{"name": label, "code": None} for label in labels]
        (directory / "labels.json").write_text(json.dumps(listed))
        (directory / "task.json").write_text(json.dumps({"task": "parts", "form": form}))
        return directory

    return write


@pytest.fixture
def make_work(tmp_path: Path) -> Callable[..., Work[InferConfig]]:
    """Build what the harness gives the stage."""

    def make(gguf: Path, data: Path, name: str = "out", **settings: Any) -> Work[InferConfig]:
        output, scratch = tmp_path / name, tmp_path / f"{name}-scratch"
        output.mkdir()
        scratch.mkdir(exist_ok=True)
        inputs = {
            role: Input(f"{role}@sha256:{'0' * 64}", role * 2, role, path, {})
            for role, path in (("gguf", gguf), ("data", data))
        }
        checkpoints: Any = None  # this stage saves nothing but its shards
        return Work(
            InferConfig(**settings),
            inputs,
            output,
            scratch,
            Progress(quiet=True),
            checkpoints,
            threading.Event(),
        )

    return make


@pytest.fixture(scope="session")
def labelled() -> Callable[[int], list[tuple[str, str]]]:
    """Return that many different texts of different lengths with labels."""
    words = ["sort a list", "open the net", "read files", "send data to the other end", "parse it"]

    def make(count: int) -> list[tuple[str, str]]:
        return [
            (f"{words[n % 5]} and {words[n // 5 % 5]} {'again ' * (n % 4)}{chr(97 + n % 26)}", LABELS[n % 5])
            for n in range(count)
        ]

    return make


def _weights(random: np.random.Generator, vocabulary: int, shape: Shape) -> dict[str, Any]:
    key_width = shape.width // shape.heads * shape.key_heads
    shapes = {
        "self_attn.q_proj": (shape.width, shape.width),
        "self_attn.k_proj": (key_width, shape.width),
        "self_attn.v_proj": (key_width, shape.width),
        "self_attn.o_proj": (shape.width, shape.width),
        "mlp.gate_proj": (shape.feed_forward, shape.width),
        "mlp.up_proj": (shape.feed_forward, shape.width),
        "mlp.down_proj": (shape.width, shape.feed_forward),
    }
    made = {"model.embed_tokens.weight": random.normal(0, 1, (vocabulary, shape.width))}
    for layer in range(shape.layers):
        for name, size in shapes.items():
            made[f"model.layers.{layer}.{name}.weight"] = random.normal(0, size[1] ** -0.5, size)
        for name in ("input_layernorm", "post_attention_layernorm"):
            made[f"model.layers.{layer}.{name}.weight"] = random.uniform(0.5, 1.5, shape.width)
    made["model.norm.weight"] = random.uniform(0.5, 1.5, shape.width)
    made["lm_head.weight"] = random.normal(0, 0.3, (vocabulary, shape.width))
    return {name: array.astype(np.float16).astype(np.float32) for name, array in made.items()}


def _write(
    path: Path, vocabulary: Sequence[tuple[str, float, int]], weights: Mapping[str, Any], shape: Shape
) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_vocab_size(len(vocabulary))
    writer.add_file_type(1)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text.encode() for text, _, _ in vocabulary])
    writer.add_token_scores([score for _, score, _ in vocabulary])
    writer.add_token_types([kind for _, _, kind in vocabulary])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    for name, array in weights.items():
        writer.add_tensor(*_tensor(name, array, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensor(name: str, array: Any, shape: Shape) -> tuple[str, Any]:
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in outer:
        return outer[name], array.astype(np.float16) if array.ndim > 1 else array
    _, _, layer, inner = name.removesuffix(".weight").split(".", 3)
    for part, heads in (("q_proj", shape.heads), ("k_proj", shape.key_heads)):
        if inner.endswith(part):  # llama.cpp pairs neighbouring dimensions in rope, transformers halves
            array = array.reshape(heads, 2, -1, shape.width).swapaxes(1, 2).reshape(array.shape)
    return f"blk.{layer}.{NAMES[inner]}.weight", array.astype(np.float16) if array.ndim > 1 else array

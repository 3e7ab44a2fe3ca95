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
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tunemill.infer.config import InferConfig
from tunemill.progress import Progress
from tunemill.prompting import Prompting
from tunemill.work import Input, Work

WIDTH, LAYERS, HEADS, KEY_HEADS, FEED_FORWARD, CONTEXT = 64, 2, 4, 2, 128, 1024
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
    directory = tmp_path_factory.mktemp("micro")
    special = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    bytes_ = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces = [(piece, -float(rank), 1) for rank, piece in enumerate(PIECES)]
    vocabulary = [*special, *bytes_, *pieces]
    weights = _weights(np.random.default_rng(7), len(vocabulary))
    _write(directory / "model-F16.gguf", vocabulary, weights)
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
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
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


def _weights(random: np.random.Generator, vocabulary: int) -> dict[str, Any]:
    key_width = WIDTH // HEADS * KEY_HEADS
    shapes = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (key_width, WIDTH),
        "self_attn.v_proj": (key_width, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (FEED_FORWARD, WIDTH),
        "mlp.up_proj": (FEED_FORWARD, WIDTH),
        "mlp.down_proj": (WIDTH, FEED_FORWARD),
    }
    made = {"model.embed_tokens.weight": random.normal(0, 1, (vocabulary, WIDTH))}
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            made[f"model.layers.{layer}.{name}.weight"] = random.normal(0, shape[1] ** -0.5, shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            made[f"model.layers.{layer}.{name}.weight"] = random.uniform(0.5, 1.5, WIDTH)
    made["model.norm.weight"] = random.uniform(0.5, 1.5, WIDTH)
    made["lm_head.weight"] = random.normal(0, 0.3, (vocabulary, WIDTH))
    return {name: array.astype(np.float16).astype(np.float32) for name, array in made.items()}


def _write(path: Path, vocabulary: Sequence[tuple[str, float, int]], weights: Mapping[str, Any]) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
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
        writer.add_tensor(*_tensor(name, array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensor(name: str, array: Any) -> tuple[str, Any]:
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in outer:
        return outer[name], array.astype(np.float16) if array.ndim > 1 else array
    _, _, layer, inner = name.removesuffix(".weight").split(".", 3)
    for part, heads in (("q_proj", HEADS), ("k_proj", KEY_HEADS)):
        if inner.endswith(part):  # llama.cpp pairs neighbouring dimensions in rope, transformers halves
            array = array.reshape(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(array.shape)
    return f"blk.{layer}.{NAMES[inner]}.weight", array.astype(np.float16) if array.ndim > 1 else array

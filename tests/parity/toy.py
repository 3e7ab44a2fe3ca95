"""A small Llama, rows whose label depends on their last word, and an adapter that learned them."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from types import SimpleNamespace

from pieces import TEMPLATE, WORDS, sentencepiece_model, tokenizer_config

THINGS, LABELS = WORDS[:8], WORDS[8:]
TRAINING = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": "all-linear",
    "learning_rate": 0.004,
    "per_device_train_batch_size": 16,
    "max_steps": 90,
    "gradient_checkpointing": False,
    "dtype": "float32",
    "use_cpu": True,
    "parity_probes": 24,
}


def make_base(directory: Path, seed: int) -> Path:
    """Widths are multiples of 256, as K-quants need them; several shards, in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory.mkdir(parents=True)
    (directory / "tokenizer.model").write_bytes(sentencepiece_model())
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=pieces(directory),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=0.05,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory, max_shard_size="700KB")
    return directory


def make_data(directory: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    directory.mkdir()
    chance = random.Random(2)
    for split, count in (("train", 240), ("validation", 40), ("test", 20)):
        rows = [row(split, number, chance) for number in range(count)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), directory / f"{split}.parquet")
    (directory / "labels.json").write_text(json.dumps([{"name": name, "code": None} for name in LABELS]))
    (directory / "task.json").write_text(json.dumps({"task": "halves", "form": "label"}))
    return directory


def row(split: str, number: int, chance: random.Random) -> dict:
    """The label depends on the last word."""
    thing = chance.randrange(len(THINGS))
    text = " ".join([*chance.choices(WORDS, k=3), THINGS[thing]])
    label = LABELS[thing // 2]
    question = [{"role": "user", "content": text}]
    return {"id": f"{split}-{number}", "prompt": question, "completion": label, "text": text, "label": label}


def train_adapter(root: Path, base: Path, data: Path) -> tuple[Path, dict]:
    """Train by the stage itself; return the adapter and the facts."""
    from tunemill.progress import Progress
    from tunemill.train.config import TrainConfig
    from tunemill.train.sft import train
    from tunemill.work import Input, Work

    output, scratch = root / "output", root / "scratch"
    for directory in (output, scratch):
        directory.mkdir(parents=True)
    inputs = {
        role: Input(f"t/{role}@sha256:{'0' * 64}", "c" * 64, role, path, {})
        for role, path in (("base", base), ("data", data))
    }
    unsaved = SimpleNamespace(latest=lambda destination: None, save=lambda directory, step: None)
    work = Work(
        TrainConfig(**TRAINING), inputs, output, scratch, Progress(quiet=True), unsaved, threading.Event()
    )
    return output, train(work)


def pieces(directory: Path) -> int:
    import sentencepiece

    model = str(directory / "tokenizer.model")
    return int(sentencepiece.SentencePieceProcessor(model_file=model).vocab_size())


def row_of(number: int) -> dict:
    """A row that depends on its number alone."""
    return row("train", number, random.Random(number))

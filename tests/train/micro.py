"""A micro Llama with a word tokenizer and a data artifact of a few rows, made in a second."""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tunemill.progress import Progress
from tunemill.train.config import TrainConfig
from tunemill.work import Input, Work

WORDS = (
    "red",
    "green",
    "blue",
    "apple",
    "sky",
    "grass",
    "rose",
    "sea",
    "leaf",
    "what",
    "color",
    "has",
    "the",
    "?",
)
SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ANSWERS = {"apple": "red", "rose": "red", "sky": "blue", "sea": "blue", "grass": "green", "leaf": "green"}
TINY = {
    "r": 4,
    "learning_rate": 0.01,
    "per_device_train_batch_size": 2,
    "max_steps": 6,
    "save_steps": 2,
    "gradient_checkpointing": False,
    "dtype": "float32",
    "use_cpu": True,
    "lora_dropout": 0.1,
}


@dataclass
class KeptCheckpoints:
    """Checkpoints in a directory, for tests without a store."""

    directory: Path
    steps: list[int] = field(default_factory=list)

    def latest(self, destination: Path) -> int | None:
        if not self.steps:
            return None
        shutil.copytree(self.directory / str(self.steps[-1]), destination)
        return self.steps[-1]

    def save(self, directory: Path, step: int) -> None:
        shutil.copytree(directory, self.directory / str(step))
        self.steps.append(step)


def make_base(directory: Path, hidden: int = 64, **changes: Any) -> Path:
    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory.mkdir(parents=True)
    vocabulary = {text: n for n, text in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(directory)
    torch.manual_seed(1)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2} | changes
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        **shape,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def row(number: int, thing: str, answer: str) -> dict[str, Any]:
    question = " ".join(["what color has the", *["the"] * (number % 3), thing, "?"])
    return {
        "id": f"r{number}", "prompt": [{"role": "user", "content": question}], "completion": answer,
        "text": question, "label": answer, "group": number,
    }  # fmt: skip


def make_data(directory: Path, copies: int = 3, **more: list[dict[str, Any]]) -> Path:
    directory.mkdir(parents=True)
    rows = [row(n, thing, answer) for n, (thing, answer) in enumerate(list(ANSWERS.items()) * copies)]
    for split, content in {"train": rows, **more}.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), directory / f"{split}.parquet")
    return directory


def make_work(root: Path, base: Path, data: Path, name: str = "run", **settings: Any) -> Work[Any]:
    output, scratch = root / name / "output", root / name / "scratch"
    for directory in (output, scratch):
        directory.mkdir(parents=True)
    inputs = {
        "base": Input("base/micro@sha256:" + "0" * 64, "c" * 64, "base", base, {}),
        "data": Input("run/data@sha256:" + "1" * 64, "d" * 64, "data", data, {}),
    }
    kept = KeptCheckpoints(root / name / "kept")
    config = TrainConfig(**{**TINY, **settings})
    return Work(config, inputs, output, scratch, Progress(quiet=True), kept, threading.Event())


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}

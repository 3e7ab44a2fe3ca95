"""Models and texts for the benchmark of inference, made here and kept in a folder between runs.

The tiny model is the demo's shape, once trained so that it writes labels and ends, and once with random
weights like the larger Llama shapes, which take as long as trained ones but never write a label.
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES = {
    # vocabulary, hidden, intermediate, layers, heads, key-value heads; multiples of 256 for K-quants
    "tiny": (4096, 256, 512, 2, 4, 4),
    "135m": (32000, 768, 2048, 16, 12, 4),
    "1b": (128256, 2048, 8192, 16, 32, 8),
}
PIECES = {"tiny": 4096, "135m": 8000, "1b": 8000}
CONTEXT = 4096
SPECIAL = 262  # tokens that are bytes or no text, which come first
LABELS, SHORTEST, LONGEST = 10, 40, 160  # of the short texts: labels, and characters of a text
STEPS, BATCH, LEARNED = 200, 32, 400  # of the tiny model's training: steps, and rows of a step and in all
DIMENSIONS = 46
LEVELS = ("low", "medium", "high")
RECIPES = Path(__file__).parents[2] / "tools/tunemill/recipes/tasks"

Row = tuple[str, list[dict[str, str]], str]
"""A text, the conversation that asks about it, and its label."""


@dataclass(frozen=True)
class Workload:
    """Rows of one task, as prepare writes them."""

    name: str
    labels: tuple[str, ...]
    rows: Sequence[Row]

    def save(self, folder: Path) -> Path:
        """Write the rows as a data artifact's test split and return its directory."""
        import pyarrow
        import pyarrow.parquet

        target = folder / f"data-{self.name}-{len(self.rows)}"
        target.mkdir(exist_ok=True)
        columns = {
            "id": [str(number) for number in range(len(self.rows))],
            "prompt": [messages for _, messages, _ in self.rows],
            "completion": [label for _, _, label in self.rows],
            "text": [text for text, _, _ in self.rows],
            "label": [label for _, _, label in self.rows],
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), target / "test.parquet")
        (target / "labels.json").write_text(json.dumps([{"name": name} for name in self.labels]))
        (target / "task.json").write_text(json.dumps({"task": self.name, "form": "label"}))
        return target


def short_texts(count: int) -> Workload:
    """Sentences of the standard library's docstrings, to be told which of ten chapters they are from."""
    found = [(text, label) for text, label in _sentences() if SHORTEST <= len(text) <= LONGEST]
    common = [label for label, _ in Counter(label for _, label in found).most_common(LABELS)]
    chosen = [(text, label) for text, label in found if label in common]
    random.Random(1).shuffle(chosen)
    while len(chosen) < count:  # told apart by a number, so that no two prompts are equal
        chosen += [(f"{text} ({len(chosen) + n})", label) for n, (text, label) in enumerate(chosen)]
    rows = [(text, [{"role": "user", "content": text}], label) for text, label in chosen[:count]]
    return Workload("short", tuple(sorted(common)), rows)


def cap(folder: Path, count: int) -> Workload:
    """Questions to a parliament under the instructions and 21 topics of the recipe ``cap``."""
    recipe = _recipe("cap")
    labels = recipe["labels"]
    with (folder / "test.csv").open(newline="") as source:
        entries = list(csv.DictReader(source))
    rows = []
    for entry in entries[:count]:
        values = {**entry, "labels": "; ".join(labels.values())}
        messages = [
            {"role": "system", "content": recipe["system_prompt"]},
            {"role": "user", "content": _filled(recipe["prompt"], values)},
        ]
        rows.append((entry["text"], messages, labels.get(entry["label"], next(iter(labels.values())))))
    return Workload("cap", tuple(labels.values()), rows)


def dimensions(texts: int) -> Workload:
    """Paragraphs to be rated on 46 dimensions, each in a prompt of its own: text first, dimension last."""
    sentences = [text for text, _ in _sentences()]
    rows = []
    for number in range(texts):
        text = " ".join(sentences[12 * number : 12 * number + 12])
        for dimension in range(DIMENSIONS):
            question = f"{text}\n\nHow much does this text speak of aspect {dimension + 1} of well-being?"
            messages = [
                {"role": "system", "content": "Answer with low, medium or high."},
                {"role": "user", "content": question},
            ]
            rows.append((text, messages, LEVELS[dimension % 3]))
    return Workload("dimensions", LEVELS, rows)


def _sentences() -> Iterator[tuple[str, str]]:
    from tunemill.data import stdlib

    for docstring in stdlib.docstrings():
        for sentence in re.split(r"(?<=[.:])\s+", docstring.text):
            yield " ".join(sentence.split()), docstring.label


def _recipe(task: str) -> dict[str, Any]:
    import yaml

    recipe: dict[str, Any] = yaml.safe_load((RECIPES / f"{task}.yaml").read_text())
    return recipe


def _filled(template: str, values: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)


@dataclass(frozen=True)
class Made:
    """A model in the forms that the methods read."""

    name: str
    folder: Path
    """Hugging Face files."""

    def gguf(self, kind: str) -> Path:
        """The directory of one GGUF with its prompting record."""
        return self.folder.with_name(f"{self.folder.name}-{kind}")


def make_model(folder: Path, name: str, kinds: Sequence[str]) -> Made:
    """Make a model and its GGUFs unless they are there; one named ``SHAPE-trained`` learns to answer."""
    made = Made(name, folder / name)
    if not (made.folder / "model.safetensors").exists():
        shape, _, trained = name.partition("-")
        _make_weights(made.folder, shape, short_texts(LEARNED) if trained else None)
    for kind in kinds:
        target = made.gguf(kind) / f"model-{kind}.gguf"
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            _quantize(made, kind, target)
    return made


def _make_weights(folder: Path, shape: str, training: Workload | None) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tunemill.data.stdlib import docstrings
    from tunemill.data.tiny import write_tokenizer

    vocabulary, hidden, inner, layers, heads, pairs = SHAPES[shape]
    write_tokenizer(folder, [docstring.text for docstring in docstrings()], PIECES[shape])
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=pairs, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if training:
        _train(model, folder, training)
    else:  # writes no bytes: llama-cpp-python counts no token while a character is not complete
        torch.nn.init.zeros_(model.get_input_embeddings().weight[:SPECIAL])
    model.to(torch.float16).save_pretrained(folder)


def _train(model: Any, folder: Path, training: Workload) -> None:
    """Teach the model to answer; what it learns of the topics does not matter, that it ends a label does."""
    import torch
    from transformers import AutoTokenizer

    from tunemill.prompting import read_prompting

    tokenizer, prompting = AutoTokenizer.from_pretrained(folder), read_prompting(folder)
    answers = {label: prompting.completion(training.rows[0][1], label) for label in training.labels}
    examples = []
    for _, messages, label in training.rows:
        texts = (prompting.prompt(messages), answers[label])
        prompt, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
        examples.append((prompt + answer, [-100] * len(prompt) + answer))
    examples.sort(key=lambda example: len(example[0]))
    chance = random.Random(1)
    rate = 4e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(STEPS):
        start = chance.randrange(max(1, len(examples) - BATCH))
        batch = examples[start : start + BATCH]
        longest = max(len(tokens) for tokens, _ in batch)
        ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in batch])
        wanted = torch.tensor([answer + [-100] * (longest - len(answer)) for _, answer in batch])
        loss = model(input_ids=ids, labels=wanted).loss
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate * (1 - step / STEPS)
        optimizer.step()
        optimizer.zero_grad()
    print(f"a model was trained: loss {loss.item():.2f}")


def _quantize(made: Made, kind: str, target: Path) -> None:
    from tunemill.gguf.source import find_source
    from tunemill.prompting import read_prompting

    read_prompting(made.folder).save(target.parent)
    if kind == "F16":
        script = find_source().directory / "convert_hf_to_gguf.py"
        words = [sys.executable, str(script), str(made.folder), "--outfile", str(target), "--outtype", "f16"]
        subprocess.run(words, check=True, capture_output=True)
        return
    import llama_cpp

    from tunemill.gguf.quantizer import quantize
    from tunemill.infer.model import listen
    from tunemill.llama import load_llama

    source = made.gguf("F16") / "model-F16.gguf"
    if not source.exists():
        source.parent.mkdir(exist_ok=True)
        _quantize(made, "F16", source)
    number = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    threads = os.cpu_count() or 1
    listen()
    quantize(load_llama(), str(source), str(target), {"ftype": number, "nthread": threads})


def prompts(gguf: Path, workload: Workload) -> dict[str, Any]:
    """Return what every method is given: each row's token ids, the labels, and their longest in tokens."""
    from tunemill.infer.model import Model
    from tunemill.prompting import read_prompting

    prompting = read_prompting(gguf)
    with Model(next(gguf.glob("*.gguf")), 0) as model:
        tokens: Callable[[str], tuple[int, ...]] = model.tokens
        rows = [list(tokens(prompting.prompt(messages))) for _, messages, _ in workload.rows]
        messages = workload.rows[0][1]
        lengths = [len(tokens(prompting.completion(messages, label))) for label in workload.labels]
    return {"rows": rows, "labels": list(workload.labels), "answer_tokens": max(lengths)}

"""The model of ``tunemill.gguf.selfcheck`` with the data of a task: which letters come next."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tunemill.gguf.library import Library
from tunemill.gguf.selfcheck import SPECIAL, write_counting_model
from tunemill.parity.probes import Rendering, choose
from tunemill.prompting import Prompting, read_prompting

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
ROWS = (("abc", "def"), ("tuv", "wxy"), ("bc", "def"))


def save_model(folder: Path) -> None:
    """Write the unquantized GGUF, and how it is prompted."""
    folder.mkdir()
    write_counting_model(folder / "model-F16.gguf")
    save_prompting(folder)


def save_prompting(folder: Path) -> None:
    Prompting(TEMPLATE, "<s>", "</s>", add_bos=True).save(folder)


def save_data(folder: Path) -> None:
    """Write a data artifact with the same few rows in every split."""
    folder.mkdir()
    rows: list[dict[str, Any]] = [
        {"id": text, "prompt": [{"role": "user", "content": text}], "completion": label, "text": text}
        | {"label": label, "group": number}
        for number, (text, label) in enumerate(ROWS)
    ]
    for split in ("train", "validation", "test"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")
    labels = [{"name": name, "code": None} for name in ("def", "wxy")]
    (folder / "labels.json").write_text(json.dumps(labels))
    (folder / "task.json").write_text(json.dumps({"task": "counting", "form": "label"}))


def save_probes(model: Path, data: Path, scratch: Path) -> None:
    """Write a probe set of the data into the model's folder, with the model's own answers."""
    library = Library(scratch, threading.Event())
    rows = pyarrow.parquet.read_table(data / "train.parquet").to_pylist()

    def tokenize(texts: Sequence[str]) -> Any:
        return library.tokenize(model / "model-F16.gguf", list(texts)).value["ids"]

    rendering = Rendering(read_prompting(model), tokenize, SPECIAL + 256)
    probes = choose(rows, "train", ["def", "wxy"], rendering, 3)
    probes.save(model)
    library.measure(model / "model-F16.gguf", probes).save(model)

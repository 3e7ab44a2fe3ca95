"""The imatrix stage: what matters in a model when it reads the prompts of its own task.

Training rows are rendered as in training, answer included, and read by the unquantized model. Rows of
the probe set are left out, so that what parity measures later is held out; a text that is also in the
test split ends the stage, since a quantization fitted to test texts would flatter the test.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunemill.errors import BadDataError
from tunemill.gguf.child import read_end
from tunemill.gguf.config import ImatrixConfig
from tunemill.gguf.imatrix import FILE, read_imatrix
from tunemill.gguf.library import Answer, Library
from tunemill.gguf.parts import read_model
from tunemill.gguf.quantize import COUNTED, refuse_quantized
from tunemill.gguf.tokens import read_rows
from tunemill.ggufs import find_gguf
from tunemill.parity.probes import FILE as PROBES
from tunemill.parity.probes import Probes
from tunemill.prompting import read_prompting
from tunemill.work import Facts, Work

Row = Mapping[str, Any]


def collect(work: Work[ImatrixConfig]) -> Facts:
    """Write ``imatrix.gguf`` into ``work.output``.

    Raises:
        BadDataError: an input is damaged or quantized, there are no training rows, or one of them is
            also in the test split.
    """
    gguf, data = work.inputs["gguf"], work.inputs["data"]
    model = read_model(find_gguf(gguf.path))
    refuse_quantized(model)
    rows = choose(data.path, _probed(gguf.path), work.config.imatrix_prompts)
    prompting = read_prompting(gguf.path)
    texts = [
        (prompting.prompt(row["prompt"]), prompting.completion(row["prompt"], row["completion"]))
        for row in rows
    ]
    answer = _run(work, model.path, texts, data.reference)
    (work.scratch / FILE).replace(work.output / FILE)
    matrix = read_imatrix(work.output / FILE)
    lengths = answer.value["tokens"]
    unseen = matrix.unseen()
    if unseen:
        work.progress.say(
            f"{sum(unseen.values())} experts of {len(unseen)} tensors saw no token and are quantized without "
            "importance: raise imatrix_prompts"
        )
    return {
        "texts": len(texts),
        "tokens": sum(min(length, work.config.imatrix_context) for length in lengths),
        "cut": sum(length > work.config.imatrix_context for length in lengths),
        "entries": len(matrix.sums),
        "experts_unseen": unseen,
        "model_content": gguf.content,
        "llama_cpp": answer.llama["version"],
    }


def choose(data: Path, left_out: frozenset[str], count: int) -> list[Row]:
    """Return ``count`` training rows, evenly spread, or all there are.

    ``left_out`` are the texts of rows that are not to be taken.

    Raises:
        BadDataError: there are none, or the text of one of them is in the test split.
    """
    rows: dict[str, list[tuple[int, Row]]] = {}
    for split, number, read in read_rows(data):
        rows.setdefault(split, []).append((number, read))
    found = [entry for entry in rows.get("train", []) if _same(_asked(entry[1])) not in left_out]
    if not found:
        raise BadDataError(f"{data} has no training rows to read: run prepare again")
    wanted = min(count, len(found))
    chosen = [found[place * len(found) // wanted] for place in range(wanted)]
    tested = {_same(_asked(row)): number for number, row in rows.get("test", [])}
    for number, row in chosen:
        if (twin := tested.get(_same(_asked(row)))) is not None:
            raise BadDataError(
                f"train row {number} has the text of test row {twin} ({row['text'][:60]!r}): an importance "
                "matrix of test texts would flatter the test; prepare keeps equal ones together: run it again"
            )
    return [row for _, row in chosen]


def _run(work: Work[ImatrixConfig], model: Path, texts: Sequence[Sequence[str]], dataset: str) -> Answer:
    config, library = work.config, Library(work.scratch, work.stop)
    settings = {
        "chunk": config.imatrix_context,
        "threads": config.n_threads or os.cpu_count() or 1,
        "dataset": dataset,
    }
    with work.progress.task("imatrix", len(texts), "texts") as task:

        def tick() -> None:
            counted = COUNTED.findall(read_end(library.log))
            if counted and int(counted[-1]) > task.done:
                task.advance(int(counted[-1]) - task.done)

        target = work.scratch / FILE
        answer = library.imatrix(model, texts, target, settings, config.n_gpu_layers, tick)
        task.advance(len(texts) - task.done)
    return answer


def _probed(gguf: Path) -> frozenset[str]:
    """Return the texts of the probe set that came with a model; none where it has no probe set."""
    if not (gguf / PROBES).exists():
        return frozenset()
    return frozenset(_same(_said(probe.messages)) for probe in Probes.load(gguf).probes)


def _asked(row: Row) -> str:
    return _said(row["prompt"])


def _said(messages: Sequence[Mapping[str, str]]) -> str:
    """Return what the user says in a conversation; instructions are the same in all."""
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


def _same(text: str) -> str:
    """Return what texts share that prepare holds for the same."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())

"""A GGUF answers the probe set, within the child process that loads llama.cpp.

Keys and values are kept in float32 and attention is computed plainly, on the CPU: so what differs from
the model that the file was made from is the weights and their type, not the way of computing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunemill.errors import BadDataError
from tunemill.parity.measure import AT_ONCE, Logits, measure
from tunemill.parity.probes import Probes

CELL_STEP = 256  # llama.cpp rounds the number of cells up to this
GGML_TYPE_F32 = 0
SEQUENCES = AT_ONCE + 1  # the prompt's own and one for each text after it


def answer(llama_cpp: Any, model: Any, probes: str, target: str) -> dict[str, Any]:
    """Write the distributions of a loaded model for the probe set in ``probes`` into ``target``.

    Both are directories. A line ``[ 3/ 64]`` in the log counts the probes done.
    """
    chosen = Probes.load(Path(probes))
    engine = LlamaEngine(llama_cpp, model, _cells(chosen))
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        os.write(2, f"[{done:4}/{len(chosen.probes):4}]\n".encode())

    try:
        measure(engine, chosen, tick).save(Path(target))
    except BadDataError as error:
        raise SystemExit(f"error: {error}") from error
    return {"probes": chosen.digest}


def _cells(probes: Probes) -> int:
    """Return how many tokens are remembered at once at most."""
    return max(
        len(probe.prompt.tokens)
        + max(
            len(probe.answer.tokens), AT_ONCE * max((len(label.tokens) for label in probe.labels), default=0)
        )
        for probe in probes.probes
    )


class LlamaEngine:
    """A llama.cpp context over a loaded model."""

    def __init__(self, llama_cpp: Any, model: Any, cells: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = -(-cells // CELL_STEP) * CELL_STEP
        params.n_seq_max = SEQUENCES
        params.kv_unified = True
        params.swa_full = True  # sequences that share a prompt need all of it
        params.type_k = params.type_v = GGML_TYPE_F32
        params.flash_attn_type = 0
        params.n_threads = params.n_threads_batch = os.cpu_count() or 1
        self._llama: Any = llama_cpp
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit(f"error: llama.cpp has no memory for {params.n_ctx} tokens of context")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self._length = 0

    def read(self, tokens: Sequence[int], wanted: Sequence[int]) -> Logits:
        """Read a prompt anew; return ``(wanted, vocabulary)`` logits after those of its tokens."""
        self._llama.llama_memory_clear(self._memory, True)
        self._length = len(tokens)
        outputs = set(wanted)
        return self._decode([(token, place, 0, place in outputs) for place, token in enumerate(tokens)])

    def go_on(self, texts: Sequence[Sequence[int]]) -> list[Logits]:
        """Return for each text after the prompt the logits after each of its tokens."""
        entries = []
        for sequence, text in enumerate(texts, start=1):
            self._llama.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
            entries += [(token, self._length + place, sequence, True) for place, token in enumerate(text)]
        logits = self._decode(entries)
        for sequence in range(1, len(texts) + 1):
            self._llama.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        ends = np.cumsum([len(text) for text in texts])
        return np.split(logits, ends[:-1])

    def _decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> Logits:
        """Compute tokens, each with its place, its sequence and whether its logits are wanted."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for number, (token, place, sequence, wanted) in enumerate(entries):
            batch.token[number], batch.pos[number] = token, place
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, sequence
            batch.logits[number] = wanted
        if status := self._llama.llama_decode(self._context, batch):
            raise SystemExit(f"error: llama.cpp could not compute {len(entries)} tokens (status {status})")
        rows = sum(entry[3] for entry in entries)
        logits = self._llama.llama_get_logits(self._context)
        return np.array(np.ctypeslib.as_array(logits, shape=(rows, self._vocabulary)))

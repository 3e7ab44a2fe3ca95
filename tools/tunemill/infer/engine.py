"""The one door to ``llama_decode``: batches of tokens in, next-token logits out.

Memory is unified: one pool of cells for all sequences, in which a token may belong to many
sequences at once. So a prompt is computed once for all its labels, and the prompts' common
beginning once for all texts. After each batch everything beyond that beginning is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import llama_cpp
import numpy as np
import numpy.typing as npt

from tunemill.errors import ConfigurationError
from tunemill.infer.model import Model, last_error

MOST_SEQUENCES = 256  # LLAMA_MAX_SEQ, compiled into llama.cpp
MICRO_BATCH = 512  # tokens computed at once; more only costs memory on a CPU
CELL_STEP = 256  # llama.cpp rounds the number of cells up to this

Ints = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Batch:
    """Tokens to decode together, ``n`` of them, each sequence's positions ascending."""

    tokens: Ints
    """``(n,)`` ids."""
    positions: Ints
    """``(n,)`` places in the text, counted from 0."""
    counts: Ints
    """``(n,)`` how many sequences each token belongs to."""
    members: Ints
    """``(sum of counts,)`` those sequences, token after token."""
    outputs: npt.NDArray[np.int8]
    """``(n,)`` 1 where the logits after the token are wanted."""


def join(batches: Iterable[Batch]) -> Batch:
    """Put batches one after the other."""
    parts = list(batches)
    return Batch(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.positions for part in parts]),
        np.concatenate([part.counts for part in parts]),
        np.concatenate([part.members for part in parts]),
        np.concatenate([part.outputs for part in parts]),
    )


def run_of(tokens: Sequence[int], start: int, members: Sequence[int], output_last: bool) -> Batch:
    """Make a batch of consecutive tokens from position ``start`` that share their sequences."""
    count = len(tokens)
    outputs = np.zeros(count, np.int8)
    outputs[-1:] = output_last
    return Batch(
        np.asarray(tokens, np.int32),
        np.arange(start, start + count, dtype=np.int32),
        np.full(count, len(members), np.int32),
        np.tile(np.asarray(members, np.int32), count),
        outputs,
    )


@dataclass(frozen=True)
class Size:
    """What a context is made for."""

    cells: int
    """Tokens remembered at once, over all sequences."""
    batch_tokens: int
    """Tokens computed at once, at least ``MOST_SEQUENCES``: fewer make llama.cpp abort."""
    flash_attention: bool


class Engine:
    """A llama.cpp context over a model. Close it, or use it as a context manager.

    Raises:
        ConfigurationError: there is not enough memory for ``size.cells``.
    """

    def __init__(self, model: Model, size: Size, threads: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.cells = -(-size.cells // CELL_STEP) * CELL_STEP
        params.n_batch = self.batch_tokens = size.batch_tokens
        params.n_ubatch = min(MICRO_BATCH, size.batch_tokens)
        params.n_seq_max = MOST_SEQUENCES
        params.kv_unified = True
        params.flash_attn_type = int(size.flash_attention)
        params.n_threads = params.n_threads_batch = threads
        last_error()
        self.vocabulary = model.vocabulary
        self._context: Any = llama_cpp.llama_init_from_model(model.handle, params)
        if not self._context:
            raise ConfigurationError(
                f"no memory for {self.cells} tokens of context with {model.path.name}: "
                f"lower n_ctx or n_batch ({last_error() or 'llama.cpp gave no reason'})"
            )
        model.adapt(self._context)
        self._memory: Any = llama_cpp.llama_get_memory(self._context)
        self._shared: tuple[int, ...] = ()

    def share(self, prefix: tuple[int, ...]) -> None:
        """Start afresh with ``prefix`` computed as the beginning of every sequence."""
        llama_cpp.llama_memory_clear(self._memory, False)
        self._shared = prefix
        for start in range(0, len(prefix), self.batch_tokens):
            piece = prefix[start : start + self.batch_tokens]
            self._run(run_of(piece, start, range(MOST_SEQUENCES), output_last=False))

    @property
    def shared(self) -> int:
        """Tokens of the common beginning."""
        return len(self._shared)

    def decode(self, batch: Batch) -> Logits:
        """Compute a batch; return ``(outputs, vocabulary)`` logits in the batch's order.

        The array is llama.cpp's own memory and valid until the next call. A batch longer than
        ``batch_tokens`` is computed in pieces and its logits copied.
        """
        total = len(batch.tokens)
        if total <= self.batch_tokens:
            return self._run(batch)
        ends = np.concatenate([[0], np.cumsum(batch.counts)])
        parts = []
        for start in range(0, total, self.batch_tokens):
            stop = min(start + self.batch_tokens, total)
            piece = Batch(
                batch.tokens[start:stop],
                batch.positions[start:stop],
                batch.counts[start:stop],
                batch.members[ends[start] : ends[stop]],
                batch.outputs[start:stop],
            )
            parts.append(self._run(piece).copy())
        return np.concatenate(parts)

    def forget(self) -> None:
        """Drop all but the common beginning from every sequence."""
        llama_cpp.llama_memory_seq_rm(self._memory, -1, self.shared, -1)

    def forget_sequence(self, sequence: int) -> None:
        """Drop all but the common beginning from one sequence."""
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, self.shared, -1)

    def close(self) -> None:
        """Free the context; safe to call twice."""
        if self._context:
            llama_cpp.llama_free(self._context)
            self._context = None

    def __enter__(self) -> Self:
        """Return the engine itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free the context."""
        self.close()

    def _run(self, batch: Batch) -> Logits:
        keep = [np.ascontiguousarray(array) for array in (batch.tokens, batch.positions, batch.counts)]
        members = np.ascontiguousarray(batch.members, dtype=np.int32)
        starts = np.concatenate([[0], np.cumsum(batch.counts)[:-1]]).astype(np.uint64)
        pointers = np.append(starts * 4 + np.uint64(members.ctypes.data), np.uint64(0))
        outputs = np.ascontiguousarray(batch.outputs)
        raw = llama_cpp.llama_batch()
        raw.n_tokens = len(batch.tokens)
        fields = (*keep, pointers, outputs)
        for name, array in zip(("token", "pos", "n_seq_id", "seq_id", "logits"), fields, strict=True):
            pointer = dict(llama_cpp.llama_batch._fields_)[name]
            setattr(raw, name, array.ctypes.data_as(pointer))
        status = llama_cpp.llama_decode(self._context, raw)
        if status != 0:
            raise ConfigurationError(
                f"llama.cpp could not compute a batch of {raw.n_tokens} tokens (status {status}, "
                f"{last_error() or 'no reason given'}): lower n_batch or n_ctx"
            )
        rows = int(outputs.sum())
        if not rows:
            return np.empty((0, self.vocabulary), np.float32)
        logits = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(rows, self.vocabulary))

"""The one door to ``llama_decode``: batches of tokens in, next-token logits out.

Memory is unified: one pool of cells for all sequences, in which a token may belong to many
sequences at once. So a prompt is computed once for all its labels, and what prompts begin with
once for all of them.

On a CPU a token's logits are the same to the last bit however many tokens are computed at once, as
long as these, and the logits wanted, are a multiple of 8: below that, and for what is left over from
groups of 4, ggml takes other kernels, which round otherwise. So what is short of a multiple is filled
up with tokens of a sequence of its own. What remains is the memory cell of each token, modulo 16 (the
lanes in which attention adds up); that is decided by the order of decoding since ``share`` alone: the
fillers' cells are free again before the next token is placed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import llama_cpp
import numpy as np
import numpy.typing as npt

from tunemill.errors import ConfigurationError
from tunemill.infer.model import Model, last_error

FILLER = 255  # the last of LLAMA_MAX_SEQ, compiled into llama.cpp
MOST_SEQUENCES = FILLER
MICRO_BATCH = 512  # tokens computed at once; more only costs memory on a CPU
CELL_STEP = 256  # llama.cpp rounds the number of cells up to this
STEP, FLASH_STEP = 8, 64  # what tokens and logits computed at once are filled up to

Ints = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]


def alike(first: Sequence[int], second: Sequence[int]) -> int:
    """Return with how many equal tokens two texts begin."""
    shortest = min(len(first), len(second))
    if first[:shortest] == second[:shortest]:
        return shortest
    return next(place for place in range(shortest) if first[place] != second[place])


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
    """Tokens computed at once, 0 for as many as is useful; more than ``MICRO_BATCH`` never are."""
    flash_attention: bool
    texts: int = 0
    """Prompts computed at once; 0 for as many as there are tokens for."""


class Engine:
    """A llama.cpp context over a model. Close it, or use it as a context manager.

    Raises:
        ConfigurationError: there is not enough memory for ``size.cells``.
    """

    def __init__(self, model: Model, size: Size, threads: int) -> None:
        params = llama_cpp.llama_context_default_params()
        self._step = FLASH_STEP if size.flash_attention else STEP
        params.n_ctx = self.cells = -(-(size.cells + self._step) // CELL_STEP) * CELL_STEP
        self.batch_tokens = min(size.batch_tokens or MICRO_BATCH, MICRO_BATCH) // self._step * self._step
        self.texts = size.texts
        params.n_seq_max = FILLER + 1
        params.n_batch = params.n_ubatch = max(self.batch_tokens, params.n_seq_max)  # else llama.cpp aborts
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
        """Start afresh with ``prefix`` as the beginning of every sequence; compute what is new of it."""
        same = alike(self._shared, prefix)
        self._shared = prefix[:same]
        self.forget()
        if same < len(prefix):
            self.decode(run_of(prefix[same:], same, (0,), output_last=False))
            for sequence in range(1, MOST_SEQUENCES):
                llama_cpp.llama_memory_seq_cp(self._memory, 0, sequence, same, len(prefix))
        self._shared = prefix

    @property
    def shared(self) -> int:
        """Tokens of the common beginning."""
        return len(self._shared)

    def decode(self, batch: Batch) -> Logits:
        """Compute a batch; return ``(outputs, vocabulary)`` logits in the batch's order.

        The array may be llama.cpp's own memory, valid until the next call. A batch longer than
        ``batch_tokens`` is computed in pieces, with the same result on a CPU.
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
        count = len(batch.tokens)
        wanted = int(batch.outputs.sum())
        filled = _filled(batch, self._step)
        self._decode(filled)
        if len(filled.tokens) > count:
            llama_cpp.llama_memory_seq_rm(self._memory, FILLER, -1, -1)
        if not wanted:
            return np.empty((0, self.vocabulary), np.float32)
        rows = int(filled.outputs.sum())
        logits = np.ctypeslib.as_array(
            llama_cpp.llama_get_logits(self._context), shape=(rows, self.vocabulary)
        )
        if np.array_equal(filled.outputs[:count], batch.outputs):
            return logits[:wanted]
        return np.asarray(logits[np.flatnonzero(batch.outputs[filled.outputs[:count] == 1])])

    def _decode(self, batch: Batch) -> None:
        keep = [np.ascontiguousarray(array) for array in (batch.tokens, batch.positions, batch.counts)]
        members = np.ascontiguousarray(batch.members, dtype=np.int32)
        starts = np.concatenate([[0], np.cumsum(batch.counts)[:-1]]).astype(np.uint64)
        pointers = np.append(starts * 4 + np.uint64(members.ctypes.data), np.uint64(0))
        raw = llama_cpp.llama_batch()
        raw.n_tokens = len(batch.tokens)
        fields = (*keep, pointers, np.ascontiguousarray(batch.outputs))
        for (name, kind), array in zip(_POINTERS, fields, strict=True):
            setattr(raw, name, array.ctypes.data_as(kind))
        status = llama_cpp.llama_decode(self._context, raw)
        if status != 0:
            raise ConfigurationError(
                f"llama.cpp could not compute a batch of {raw.n_tokens} tokens (status {status}, "
                f"{last_error() or 'no reason given'}): lower n_batch or n_ctx"
            )


_POINTERS = [
    (name, kind)
    for name, kind in llama_cpp.llama_batch._fields_
    if name in ("token", "pos", "n_seq_id", "seq_id", "logits")
]


def _filled(batch: Batch, step: int) -> Batch:
    """Add filler tokens up to a multiple of ``step``, and want as many more logits, the fillers' first."""
    count = len(batch.tokens)
    fillers = -count % step
    outputs = np.concatenate([batch.outputs, np.zeros(fillers, np.int8)])
    missing = -int(outputs.sum()) % step
    if missing:
        outputs[np.flatnonzero(outputs == 0)[::-1][:missing]] = 1
    if not fillers:
        return replace(batch, outputs=outputs)
    return Batch(
        np.concatenate([batch.tokens, np.zeros(fillers, np.int32)]),
        np.concatenate([batch.positions, np.arange(fillers, dtype=np.int32)]),
        np.concatenate([batch.counts, np.ones(fillers, np.int32)]),
        np.concatenate([batch.members, np.full(fillers, FILLER, np.int32)]),
        outputs,
    )

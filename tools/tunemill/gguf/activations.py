"""Collects an importance matrix: what goes into each matrix of a model while it reads texts.

Runs inside the child process. llama.cpp calls back before and after each operation; the inputs of its
matrix products are read there, on whatever device they are, as llama.cpp's own ``tools/imatrix`` does.
Each text is computed alone and with all its tokens wanted, since the last layer computes no others. What
was collected is saved now and then, so that a killed run goes on; the sums come out the same.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tunemill.files import atomic_write
from tunemill.gguf.imatrix import Imatrix, write_imatrix
from tunemill.llama import ggml_base

SAVE_SECONDS = 30.0
PRODUCT, PRODUCT_OF_EXPERTS = "MUL_MAT", "MUL_MAT_ID"  # ggml's names of the two operations
F32 = 0
DIMENSIONS, SOURCES, NAME = 4, 10, 64  # GGML_MAX_DIMS, GGML_MAX_SRC, GGML_MAX_NAME

Sums = npt.NDArray[np.float64]


class Tensor(ctypes.Structure):
    """``struct ggml_tensor``; the first one seen is compared with what the library itself says of it."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * DIMENSIONS),
        ("nb", ctypes.c_size_t * DIMENSIONS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * SOURCES),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * NAME),
    )


@dataclass(frozen=True)
class Settings:
    """How the texts are computed."""

    chunk: int
    """Most tokens of one text."""
    threads: int
    dataset: str
    """What the texts are, for the file."""


class Collector:
    """Sums of squares by tensor, filled by llama.cpp's callback."""

    def __init__(self) -> None:
        self.sums: dict[str, Sums] = {}
        self.counts: dict[str, Sums] = {}
        self.failure: Exception | None = None
        self._base = ggml_base()
        self._operations: dict[int, str] = {}
        self._seen = False

    def called(self, pointer: int, ask: bool, _data: object) -> bool:
        """Answer whether an operation's inputs are wanted, or take them; False ends the computing."""
        try:
            if ask:
                return self._wanted(pointer)
            self._take(Tensor.from_address(pointer))
        except Exception as error:  # noqa: BLE001 - ctypes would drop it; it is told after the call
            self.failure = error
            return False
        return True

    def _wanted(self, pointer: int) -> bool:
        tensor = Tensor.from_address(pointer)
        if not self._seen:
            self._check_layout(pointer, tensor)
        operation = self._operation(tensor.op)
        if operation not in (PRODUCT, PRODUCT_OF_EXPERTS):
            return False
        return _name(tensor.src[0]).startswith("blk.") and Tensor.from_address(tensor.src[1]).type == F32

    def _take(self, tensor: Tensor) -> None:
        name, weights = _name(tensor.src[0]), Tensor.from_address(tensor.src[0])
        inputs = self._read(tensor.src[1], np.float32)
        if self._operation(tensor.op) == PRODUCT:
            self._add(name, *_of_product(inputs, int(weights.ne[2]), int(weights.ne[3])))
        else:
            chosen = self._read(tensor.src[2], np.int32)[0, 0]
            self._add(name, *_of_experts(inputs[0], chosen, int(weights.ne[2])))

    def _add(self, name: str, sums: Sums, counts: Sums) -> None:
        if not np.isfinite(sums).all():
            raise ValueError(f"the inputs of {name} are not finite: the model is damaged")
        if name in self.sums:
            sums, counts = self.sums[name] + sums, self.counts[name] + counts
        self.sums[name], self.counts[name] = sums, counts

    def _read(self, pointer: int, kind: type[np.generic]) -> npt.NDArray[Any]:
        """Copy a tensor from its device; the array has llama.cpp's dimensions, the first one last."""
        tensor = Tensor.from_address(pointer)
        size = self._base.ggml_nbytes(pointer)
        data = bytearray(size)
        self._base.ggml_backend_tensor_get(pointer, (ctypes.c_char * size).from_buffer(data), 0, size)
        return np.ndarray(tuple(tensor.ne)[::-1], kind, data, strides=tuple(tensor.nb)[::-1])

    def _operation(self, number: int) -> str:
        if number not in self._operations:
            self._operations[number] = self._base.ggml_op_name(number).decode()
        return self._operations[number]

    def _check_layout(self, pointer: int, tensor: Tensor) -> None:
        if self._base.ggml_get_name(pointer) != tensor.name or not 0 <= tensor.op < 1000:
            raise ValueError("this llama.cpp lays out its tensors in another way: take the version named")
        self._seen = True


def collect(
    llama_cpp: Any, model: Any, texts: Sequence[Sequence[int]], target: Path, settings: Settings
) -> None:
    """Compute texts, given as token ids, and write their importance matrix; goes on after a kill.

    Prints ``[ 3/ 64]`` after each text, as the quantizer does after each tensor.
    """
    collector = Collector()
    saved = target.with_suffix(".npz")
    done = _restore(collector, saved)
    callback = llama_cpp.ggml_backend_sched_eval_callback(collector.called)  # must outlive the context
    context = _context(llama_cpp, model, callback, settings)
    batch = llama_cpp.llama_batch_init(settings.chunk, 0, 1)
    written = time.monotonic()
    for number, tokens in enumerate(texts[done:], start=done + 1):
        _compute(llama_cpp, context, batch, tokens)
        if collector.failure is not None:
            raise SystemExit(f"error: {collector.failure}")
        os.write(2, f"[{number:4}/{len(texts):4}]\n".encode())
        if time.monotonic() - written > SAVE_SECONDS:
            _save(collector, saved, number)
            written = time.monotonic()
    datasets = (settings.dataset,)
    write_imatrix(target, Imatrix(collector.sums, collector.counts, datasets, len(texts), settings.chunk))


def _of_product(inputs: npt.NDArray[Any], rows: int, planes: int) -> tuple[Sums, Sums]:
    """Return ``(1, matrices times columns)`` sums of squares and the count.

    ``inputs`` are ``(planes, rows, tokens, columns)``; a tensor of several matrices takes them in turn,
    and one matrix takes all.
    """
    squares = np.square(inputs, dtype=np.float64).sum(axis=2)
    sums = np.zeros((planes, rows, inputs.shape[3]))
    for plane in range(inputs.shape[0]):
        for row in range(inputs.shape[1]):
            sums[plane % planes, row % rows] += squares[plane, row]
    return sums.reshape(1, -1), np.array([inputs[..., 0].size / (rows * planes)])


def _of_experts(inputs: npt.NDArray[Any], chosen: npt.NDArray[np.int32], experts: int) -> tuple[Sums, Sums]:
    """Return ``(experts, columns)`` sums of squares and each expert's count.

    ``inputs`` are ``(tokens, 1 or used, columns)`` and ``chosen`` ``(tokens, used)`` experts' numbers.
    """
    squares = np.broadcast_to(
        np.square(inputs, dtype=np.float64), (len(chosen), chosen.shape[1], inputs.shape[2])
    )
    sums = np.zeros((experts, inputs.shape[2]))
    for expert in np.unique(chosen):
        sums[expert] = squares[chosen == expert].sum(axis=0)
    return sums, np.bincount(chosen.reshape(-1), minlength=experts).astype(np.float64)


def _name(pointer: int) -> str:
    """Return a tensor's name without what the scheduler adds to a copy's: ``CUDA0#blk.0.attn_k.weight#0``."""
    name: str = Tensor.from_address(pointer).name.decode()
    return name.split("#")[1] if "#" in name else name


def _context(llama_cpp: Any, model: Any, callback: Any, settings: Settings) -> Any:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = settings.chunk
    params.n_threads = params.n_threads_batch = settings.threads
    params.cb_eval = callback
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise SystemExit(f"error: llama.cpp has no memory for {settings.chunk} tokens of context")
    return context


def _compute(llama_cpp: Any, context: Any, batch: Any, tokens: Sequence[int]) -> None:
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place] = token, place
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        batch.logits[place] = True
    if status := llama_cpp.llama_decode(context, batch):
        raise SystemExit(f"error: llama.cpp could not compute {len(tokens)} tokens (status {status})")


def _save(collector: Collector, path: Path, done: int) -> None:
    arrays = {f"sums {name}": sums for name, sums in collector.sums.items()}
    arrays |= {f"counts {name}": counts for name, counts in collector.counts.items()}
    with atomic_write(path) as target:
        np.savez(target, allow_pickle=False, done=np.array(done), **arrays)


def _restore(collector: Collector, path: Path) -> int:
    """Take up what an earlier run saved; return how many texts that were."""
    if not path.exists():
        return 0
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            kind, _, name = key.partition(" ")
            if name:
                (collector.sums if kind == "sums" else collector.counts)[name] = arrays[key]
        return int(arrays["done"])

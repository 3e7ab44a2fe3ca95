"""The base as training on 4 bits saw it: quantized as bitsandbytes does, and back.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314): blocks of 64 numbers are divided by their largest magnitude
and rounded to one of 16 values; those magnitudes, less their mean, are themselves rounded to 8 bits in
blocks of 256 (double quantization). An adapter trained on that base corrects its errors too, so the
16-bit base is not always the better one to merge it into.

NumPy, because bitsandbytes needs torch, and a GPU for part of it; a test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from tunemill.errors import BadDataError
from tunemill.merge.numbers import Floats, Space, from_float32, to_float32
from tunemill.merge.source import read_some
from tunemill.weights import Header, Tensor

BLOCK = 64  # bitsandbytes' default block, the only one that transformers uses
OUTER_BLOCK = 256  # of double quantization
READ = 1 << 18  # numbers read at once
SMALLEST = np.float32(1e-38)  # a block of zeros is divided by this
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
"""Quantiles of a normal distribution, as published: no formula gives the last digits."""
FP4 = tuple(value / 12 for value in (-12, -8, -6, -4, -3, -2, -0.0625, 0, 0.0625, 2, 3, 4, 6, 8, 12))
VALUES = {"nf4": np.array(NF4, np.float32), "fp4": np.array(FP4, np.float32)}
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3")
"""``model_type`` of the models whose layers' matrices are all linear layers, which are what is quantized."""


@dataclass(frozen=True)
class FourBit:
    """How training held the base."""

    quant_type: str
    double: bool
    dtype: str
    """Type of the numbers before and after, as safetensors calls it."""

    def scales(self, descriptor: int, tensor: Tensor) -> tuple[Floats, Floats]:
        """Return the largest magnitude of each block of a tensor, before and after double quantization.

        The tensor is read once; the result has a number for each ``BLOCK`` of its.
        """
        space, total = Space(READ), prod(tensor.shape)
        largest = np.empty(-(-total // BLOCK), np.float32)
        for first in range(0, total, READ):
            values = space.values[: min(READ, total - first)]
            read_some(descriptor, tensor, first, space.stored(tensor.dtype, values.size), values)
            self._round(values, space)
            blocks = np.abs(_in_blocks(values)).max(axis=1)
            largest[first // BLOCK : first // BLOCK + len(blocks)] = blocks
        return largest, _doubly(largest) if self.double else largest

    def apply(self, values: Floats, first: int, scales: tuple[Floats, Floats], space: Space) -> None:
        """Replace numbers, the tensor's from ``first`` on, by what 4 bits leave of them.

        ``first`` is a multiple of ``BLOCK``; ``space`` holds ``values``, and its other memory is overwritten.
        """
        self._round(values, space)
        blocks = _in_blocks(values)
        largest, kept = (one[first // BLOCK : first // BLOCK + len(blocks), None] for one in scales)
        levels = VALUES[self.quant_type]
        scaled = np.clip(blocks * (np.float32(1) / np.maximum(largest, SMALLEST)), -1, 1)
        nearest = np.searchsorted((levels[:-1] + levels[1:]) / np.float32(2), scaled)
        values[:] = (levels[nearest] * kept).reshape(-1)[: values.size]
        self._round(values, space)

    def _round(self, values: Floats, space: Space) -> None:
        stored = space.stored(self.dtype, values.size)
        from_float32(values, self.dtype, space.product[: values.size], stored)
        to_float32(stored, self.dtype, values)


def _in_blocks(values: Floats) -> Floats:
    """Return (blocks, BLOCK), the last filled up with zeros."""
    return np.pad(values, (0, -values.size % BLOCK)).reshape(-1, BLOCK)


def _doubly(scales: Floats) -> Floats:
    """Quantize the blocks' magnitudes, less their mean, to 8 bits and back."""
    mean = scales.mean(dtype=np.float32)
    blocks = np.pad(scales - mean, (0, -scales.size % OUTER_BLOCK)).reshape(-1, OUTER_BLOCK)
    largest = np.maximum(np.abs(blocks).max(axis=1, keepdims=True), SMALLEST)
    levels = _dynamic_levels()
    nearest = np.searchsorted((levels[:-1] + levels[1:]) / np.float32(2), blocks / largest)
    kept: Floats = (levels[nearest] * largest).reshape(-1)[: scales.size] + mean
    return kept


def _dynamic_levels() -> Floats:
    """Return the 256 values of the signed dynamic type (Dettmers 2021, arXiv:2110.02861), in order."""
    levels = [np.array([0, 1], np.float32)]
    for exponent in range(7):
        edges = np.linspace(0.1, 1, 2**exponent + 1, dtype=np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        levels += [middles, -middles]
    return np.sort(np.concatenate(levels))


def recorded(facts: Mapping[str, Any]) -> FourBit | None:
    """Return how training held the base, as it recorded; None if not in 4 bits.

    Raises:
        BadDataError: the record is not understood.
    """
    quantization = facts.get("quantization")
    if not quantization:
        return None
    kind, dtype = quantization.get("bnb_4bit_quant_type"), STORED.get(str(facts.get("dtype")))
    if kind not in VALUES or dtype is None:
        raise BadDataError(
            f"the adapter was trained on a base quantized as {quantization}, which is not known"
        )
    return FourBit(kind, bool(quantization.get("bnb_4bit_use_double_quant")), dtype)


def held(headers: Iterable[Header], model_type: str) -> frozenset[str]:
    """Return the tensors that training held in 4 bits: the linear layers' of a dense model.

    Raises:
        BadDataError: it is not known which those are in a model of this type.
    """
    if model_type not in DENSE:
        raise BadDataError(
            f"which tensors of a model of type {model_type!r} were held in 4 bits is not known; it is of "
            f"{', '.join(DENSE)}: set qlora_base=16bit"
        )
    return frozenset(
        name
        for header in headers
        for name, tensor in header.tensors.items()
        if re.search(r"\.layers\.\d+\.", name) and name.endswith(".weight") and len(tensor.shape) == 2
    )

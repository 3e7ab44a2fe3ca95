"""Reads the headers of safetensors files without trusting them and without loading a tensor.

Base models, adapters and merged models come from anywhere. Everything here reads at most
``MAX_HEADER`` bytes per file and holds what it finds to the format's own rules: known types,
sizes that follow from shapes, tensors that lie side by side and fill the file to its last byte.
A truncated, padded or forged file is refused before anyone computes with it.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tunemill.errors import BadDataError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = (
    25 << 20
)  # a shard of 50,000 tensors has about 6 MB; JSON takes some 10 times its bytes in memory
MAX_INDEX = 100 << 20
MAX_DIMENSIONS = 8
MAX_NAME = 200  # characters of a file's name; file systems take 255 bytes
BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies in its file."""

    name: str
    dtype: str
    """As in the file: ``F32``, ``BF16`` ..."""
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte from the beginning of the file."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds; proved to fit the file's size."""

    path: Path
    tensors: Mapping[str, Tensor]
    """In the order of their bytes in the file."""
    metadata: Mapping[str, str]
    data_start: int
    """Offset of the first tensor byte: the length of everything before it."""
    size: int
    """Bytes of the whole file."""


def read_header(path: Path) -> Header:
    """Read and check one file's header.

    Raises:
        BadDataError: the file is cut short, damaged or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as source:
            prefix = source.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise _bad(path, f"its header length of {length} bytes does not fit {size} bytes of file")
            text = source.read(length)
    except OSError as error:
        raise BadDataError(f"{path} cannot be read: {error.strerror}") from error
    entries = _parse(path, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "its metadata are not texts")
    tensors = [_tensor(path, name, entry, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.size))
    _check_layout(path, tensors, 8 + length, size)
    return Header(path, {tensor.name: tensor for tensor in tensors}, metadata, 8 + length, size)


def weight_files(directory: Path) -> list[Path]:
    """Return a model's safetensors files: those its index names, else the single one.

    Raises:
        BadDataError: there are none, one is missing, or the index is malformed.
    """
    index = directory / INDEX
    if not index.exists():
        if not (directory / SINGLE).is_file():
            raise BadDataError(f"{directory.name} has no safetensors weights: expected {SINGLE} or {INDEX}")
        return [directory / SINGLE]
    if index.stat().st_size > MAX_INDEX:
        raise BadDataError(f"{index} is larger than {MAX_INDEX >> 20} MiB")
    weight_map = _parse(index, index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadDataError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        beside = Path(name).name == name and "\0" not in name and len(name) <= MAX_NAME
        if not beside or not name.endswith(".safetensors"):
            raise BadDataError(f"{index} names {name[:80]!r}, which is not a safetensors file beside it")
        if not (directory / name).is_file():
            raise BadDataError(f"{directory.name} lacks {name}, which its index names: fetch the model again")
    return [directory / name for name in names]


def read_headers(directory: Path) -> list[Header]:
    """Read the headers of all weight files of a model, and check them against its index.

    Raises:
        BadDataError: a file is damaged, a tensor is in two files, or the index does not agree.
    """
    headers = [read_header(path) for path in weight_files(directory)]
    places: dict[str, str] = {}
    for header in headers:
        for name in header.tensors:
            if name in places:
                raise BadDataError(f"{name} is both in {places[name]} and in {header.path.name}")
            places[name] = header.path.name
    index = directory / INDEX
    if index.exists():
        named = _parse(index, index.read_bytes())["weight_map"]
        for name in sorted(named.keys() ^ places.keys()) + [n for n in places if named.get(n) != places[n]]:
            raise BadDataError(f"{index} puts {name} in {named.get(name)}, but it is in {places.get(name)}")
    return headers


def _tensor(path: Path, name: str, entry: Any, base: int) -> Tensor:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _bad(path, f"its entry for {name[:80]!r} lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _bad(path, f"{name[:80]!r} has the unknown type {str(dtype)[:20]!r}")
    numbers = [*shape, start, end] if isinstance(shape, list) else [None]
    if not all(type(number) is int and 0 <= number < 1 << 50 for number in numbers):
        raise _bad(path, f"{name[:80]!r} has an impossible shape or offset")
    if len(shape) > MAX_DIMENSIONS or (end - start) * 8 != prod(shape) * BITS[dtype]:
        raise _bad(path, f"{name[:80]!r} of {dtype} {shape[:8]} cannot take {end - start} bytes")
    return Tensor(name, dtype, tuple(shape), base + start, end - start)


def _check_layout(path: Path, tensors: list[Tensor], start: int, size: int) -> None:
    for tensor in tensors:
        if tensor.start != start:
            raise _bad(path, f"there is a gap or an overlap before {tensor.name[:80]!r}")
        start += tensor.size
    if start > size:
        raise _bad(path, f"it is cut short: {start - size} of {start} bytes are missing")
    if start < size:
        raise _bad(path, f"{size - start} bytes follow its last tensor")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key occurs twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"its JSON cannot be parsed: {str(error)[:120]}") from error
    if not isinstance(value, dict):
        raise _bad(path, "it holds no JSON object")
    return value


def _bad(path: Path, what: str) -> BadDataError:
    return BadDataError(f"{path} is not a whole safetensors file: {what}")

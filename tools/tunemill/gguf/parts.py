"""GGUF models in several files: read as one, and joined into one.

Each part is a GGUF with tensors of its own. The first has the model's metadata; all say which part they
are (``split.no``), of how many (``split.count``), and how many tensors the model has
(``split.tensors.count``). A joined file says that it has no parts by a count of 0, as llama.cpp's
``gguf-split --merge`` writes it; the tensors' bytes are those of the parts.

Format: https://github.com/ggml-org/llama.cpp/tree/master/tools/gguf-split
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from tunemill.errors import BadDataError
from tunemill.files import atomic_write, need_space
from tunemill.gguf.header import GgufHeader, GgufTensor, read_gguf
from tunemill.gguf.types import BLOCKS
from tunemill.ggufs import parts_of

NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
CHUNK = 8 << 20  # bytes copied at once
UINT16 = 2  # the format's number for the type of a count of parts
KINDS = {name: kind for kind, (name, _, _) in BLOCKS.items()}


def read_parts(first: Path) -> list[GgufHeader]:
    """Read and check all parts of a model; one that is in one file has one.

    Raises:
        BadDataError: a part is damaged or missing, or they are not parts of one model.
    """
    paths = parts_of(first)
    headers = [read_gguf(path) for path in paths]
    if len(paths) == 1 and not headers[0].metadata.get(COUNT):
        return headers
    names = [tensor.name for header in headers for tensor in header.tensors]
    for number, header in enumerate(headers):
        said = tuple(header.metadata.get(key) for key in (NUMBER, COUNT, TENSORS))
        if said != (number, len(paths), len(names)):
            raise BadDataError(
                f"{header.path.name} says that it is part {said[0]} of {said[1]} of {said[2]} tensors, "
                f"not part {number} of {len(paths)} of {len(names)}: pull or convert the model again"
            )
    if len(set(names)) < len(names):
        raise BadDataError(f"{first.name} and its parts hold a tensor twice: convert the model again")
    return headers


def read_model(first: Path) -> GgufHeader:
    """Return one header for all parts; offsets are those in the tensors' own files.

    Raises:
        BadDataError: as ``read_parts``.
    """
    headers = read_parts(first)
    tensors = tuple(tensor for header in headers for tensor in header.tensors)
    return replace(headers[0], tensors=tensors, size=sum(header.size for header in headers))


def join(first: Path, target: Path, tick: Callable[[int], None]) -> None:
    """Write the model of ``first`` and its parts into one file; ``tick`` is told of bytes written.

    Raises:
        BadDataError: as ``read_parts``, or it has no parts to join.
        TransientError: the disk is full.
    """
    headers = read_parts(first)
    if len(headers) == 1:
        raise BadDataError(f"{first.name} is in one file already")
    need_space(target.parent, sum(header.size for header in headers))
    alignment = int(str(headers[0].metadata.get("general.alignment", 32)))
    tensors = [(header.path, tensor) for header in headers for tensor in header.tensors]
    with atomic_write(target) as sink:
        sink.write(_head(headers[0], [tensor for _, tensor in tensors], alignment))
        for path, tensor in tensors:
            _pad(sink, alignment)
            with path.open("rb") as source:
                _copy(source, sink, tensor, tick)
        _pad(sink, alignment)


def _head(first: GgufHeader, tensors: Sequence[GgufTensor], alignment: int) -> bytes:
    """Return all before the data: the first part's metadata, and where each tensor lies now."""
    with first.path.open("rb") as source:
        head = bytearray(source.read(first.tensors_start))
    key = struct.pack("<Q", len(COUNT)) + COUNT.encode() + struct.pack("<I", UINT16)
    if head.count(key) != 1:
        raise BadDataError(f"{first.path.name} has {COUNT} in another form than llama.cpp's")
    place = head.index(key) + len(key)
    head[place : place + 2] = bytes(2)
    head[8:16] = struct.pack("<Q", len(tensors))
    offset = 0
    for tensor in tensors:
        name, shape = tensor.name.encode(), tensor.shape
        head += struct.pack("<Q", len(name)) + name
        head += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, KINDS[tensor.type], offset)
        offset += tensor.size + -tensor.size % alignment
    return bytes(head)


def _copy(source: IO[bytes], sink: IO[bytes], tensor: GgufTensor, tick: Callable[[int], None]) -> None:
    source.seek(tensor.start)
    left = tensor.size
    while left:
        chunk = source.read(min(CHUNK, left))
        if not chunk:
            raise BadDataError(f"{source.name} became shorter while it was read")
        sink.write(chunk)
        left -= len(chunk)
        tick(len(chunk))


def _pad(sink: IO[bytes], alignment: int) -> None:
    sink.write(bytes(-sink.tell() % alignment))

"""Decides, from headers alone, what every file of the merged model will hold.

The merged model keeps the base's shards, names, order and types, so all bytes the adapter does not
touch can be copied. Two things may grow: the embeddings, when training added tokens, and the last
tensor of a shard's list, when input and output embeddings share one tensor and the adapter changes
them differently: then the output embeddings need a tensor of their own.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from tunemill.errors import BadDataError
from tunemill.merge.adapter import FLOATS
from tunemill.merge.change import Change
from tunemill.merge.four_bit import FourBit
from tunemill.merge.places import HEAD, HEAD_BIAS, embedding_of, place_changes
from tunemill.merge.same import same_change
from tunemill.weights import BITS, Header, Tensor


@dataclass(frozen=True)
class Place:
    """One tensor of an output file."""

    name: str
    shape: tuple[int, ...]
    source: Tensor
    """The base's tensor, whose type it keeps."""
    change: Change | None
    start: int = 0
    """Offset in the output file."""
    four_bit: FourBit | None = None
    """How training held the base's numbers, where the change is made to those."""

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * BITS[self.source.dtype] // 8


@dataclass(frozen=True)
class Shard:
    """One output file."""

    source: Path
    header: bytes
    """Everything before the first tensor byte."""
    places: tuple[Place, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(place.size for place in self.places)


@dataclass(frozen=True)
class Plan:
    """The merged model's weights."""

    shards: tuple[Shard, ...]
    untied: str | None
    """The file in which the output embeddings got a tensor of their own, if they did."""
    vocabulary: int | None
    """Rows of the embeddings, if training added tokens."""

    def on(self, four_bit: FourBit, names: Collection[str]) -> Plan:
        """Return the same plan with the named tensors as training on 4 bits saw them."""
        shards = [
            replace(shard, places=tuple(_held(place, four_bit, names) for place in shard.places))
            for shard in self.shards
        ]
        return replace(self, shards=tuple(shards))

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, as an index states them."""
        return sum(place.size for shard in self.shards for place in shard.places)

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(prod(place.shape) for shard in self.shards for place in shard.places)

    @property
    def changed(self) -> int:
        """How many tensors are not the base's."""
        return sum(place.change is not None for shard in self.shards for place in shard.places)


def _held(place: Place, four_bit: FourBit, names: Collection[str]) -> Place:
    if place.name not in names or (place.change and place.change.whole):
        return place
    return replace(place, four_bit=four_bit, change=place.change or Change())


def plan_merge(
    headers: Sequence[Header],
    changes: Mapping[str, Change],
    config: Mapping[str, Any],
    adapter: str,
    keep_tied: bool = False,
) -> Plan:
    """Lay out the merged model.

    ``changes`` are under the model's names; ``config`` is the base's; ``adapter`` names the adapters in
    messages; ``keep_tied`` is PEFT's ``ensure_weight_tying``.

    Raises:
        BadDataError: the adapter names a tensor the base lacks, or one of another shape.
    """
    base = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    placed = place_changes(changes, base, str(config.get("model_type")), adapter)
    tied = embedding_of(base) if HEAD not in base else None
    together = tied is not None and _stay_tied(placed, tied, keep_tied)
    if together:
        placed.pop(HEAD, None)
    apart = tied if not together and placed.keys() & {HEAD, tied} else None
    vocabulary = _vocabulary(placed, base, apart, adapter)
    for name, change in placed.items():
        own = base[tied if name == HEAD and tied else name]
        shape = _shape(name, own, vocabulary)
        placed[name] = _settled(change, shape)
        _check(name, placed[name], own, shape, adapter)
    shards = [
        _shard(header, placed, apart if apart in header.tensors else None, vocabulary) for header in headers
    ]
    untied = [header.path.name for header in headers if apart in header.tensors]
    return Plan(tuple(shards), untied[0] if untied else None, vocabulary)


def _stay_tied(changes: Mapping[str, Change], embedding: str, keep_tied: bool) -> bool:
    """Return whether output embeddings that share the input's tensor still do.

    Tokens trained alone, and what ``ensure_weight_tying`` covers, count for both where only the input
    embeddings are named.
    """
    own, head = changes.get(embedding), changes.get(HEAD)
    if own is None:
        return head is None
    if head is None:
        return keep_tied or own == Change(tokens=own.tokens)
    return same_change(own, head)


def _vocabulary(
    changes: Mapping[str, Change], base: Mapping[str, Tensor], apart: str | None, adapter: str
) -> int | None:
    """Return the number of rows that resized embeddings have, or None when they keep theirs.

    Raises:
        BadDataError: only some of what has a row for each token was resized.
    """
    embedding = embedding_of(base)
    if embedding is None or len(base[embedding].shape) != 2:
        return None
    rows = base[embedding].shape[0]
    names = [name for name in (embedding, HEAD, HEAD_BIAS) if name in base or (name == HEAD and apart)]
    sizes = {name: _rows(changes.get(name), rows) for name in names}
    if set(sizes.values()) <= {rows}:
        return None
    if len(set(sizes.values())) > 1 or min(sizes.values()) < rows:
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise BadDataError(
            f"{adapter} resizes the vocabulary of {rows} only in part ({shown}): save it with PEFT's "
            "save_embedding_layers=True, from the model that was trained"
        )
    return sizes[embedding]


def _rows(change: Change | None, otherwise: int) -> int:
    return change.whole.shape[0] if change and change.whole and change.whole.shape else otherwise


def _shape(name: str, base: Tensor, vocabulary: int | None) -> tuple[int, ...]:
    per_token = name in (HEAD, HEAD_BIAS) or embedding_of({name: base}) is not None
    return (vocabulary, *base.shape[1:]) if vocabulary and per_token else base.shape


def _settled(change: Change, shape: tuple[int, ...]) -> Change:
    """Let the base's shape decide where it can: PEFT transposes by the kind of layer, not by the setting."""
    if any(pair.shape == shape or pair.shape[::-1] != shape for pair in change.pairs):
        return change
    return replace(
        change, pairs=tuple(replace(pair, transposed=not pair.transposed) for pair in change.pairs)
    )


def _check(name: str, change: Change, base: Tensor, shape: tuple[int, ...], adapter: str) -> None:
    if base.dtype not in FLOATS:
        raise BadDataError(f"the base's {name} is of type {base.dtype}: merge into the unquantized base")
    found = [whole.shape for whole in (change.whole, change.added) if whole]
    # An expert's rows were counted when it was placed.
    found += [(shape[0], *pair.shape[1:]) if change.slice else pair.shape for pair in change.pairs]
    if tokens := change.tokens:
        found.append((max(shape[0], 1 + max(tokens.indices)), *tokens.rows.shape[1:]))
    for other in found:
        if other != shape:
            raise BadDataError(
                f"{adapter} was trained on another base: it changes {name} as {list(other)}, "
                f"but the base's is {list(base.shape)}"
            )


def _shard(header: Header, changes: Mapping[str, Change], apart: str | None, vocabulary: int | None) -> Shard:
    places = [
        Place(name, _shape(name, tensor, vocabulary), tensor, changes.get(name), tensor.start)
        for name, tensor in header.tensors.items()
    ]
    if apart is not None:
        tensor = header.tensors[apart]
        places.append(Place(HEAD, _shape(HEAD, tensor, vocabulary), tensor, changes.get(HEAD)))
    if apart is None and all(place.size == place.source.size for place in places):
        with header.path.open("rb") as source:
            return Shard(header.path, source.read(header.data_start), tuple(places))
    text = _header(places, header.metadata)
    start, moved = len(text), []
    for place in places:
        moved.append(replace(place, start=start))
        start += place.size
    return Shard(header.path, text, tuple(moved))


def _header(places: Sequence[Place], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata) or {"format": "pt"}}
    offset = 0
    for place in places:
        entries[place.name] = {
            "dtype": place.source.dtype,
            "shape": list(place.shape),
            "data_offsets": [offset, offset + place.size],
        }
        offset += place.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the first tensor to 8 bytes
    return struct.pack("<Q", len(text)) + text

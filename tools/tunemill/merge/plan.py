"""Decides, from headers alone, what every file of the merged model will hold.

The merged model keeps the base's shards, names, order and types, so all bytes the adapter does not
touch can be copied. One thing may be added: when input and output embeddings share one tensor and
the adapter changes one of the two, the other keeps the base's values and needs a tensor of its own.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tunemill.errors import BadDataError
from tunemill.merge.adapter import FLOATS, Adapter, Change
from tunemill.weights import Header, Tensor

HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight")


@dataclass(frozen=True)
class Place:
    """One tensor of an output file."""

    name: str
    source: Tensor
    """The base's tensor."""
    change: Change | None
    start: int
    """Offset in the output file; type, shape and size are the source's."""


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
        return len(self.header) + sum(place.source.size for place in self.places)


@dataclass(frozen=True)
class Plan:
    """The merged model's weights."""

    shards: tuple[Shard, ...]
    untied: str | None
    """The file in which the output embeddings got a tensor of their own, if they did."""

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, as an index states them."""
        return sum(place.source.size for shard in self.shards for place in shard.places)


def plan_merge(headers: Sequence[Header], adapter: Adapter) -> Plan:
    """Lay out the merged model.

    Raises:
        BadDataError: the adapter names a tensor the base lacks, or one of another shape.
    """
    base = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    changes = _located(adapter, base)
    tied = _tied_embedding(base, changes)
    if tied and adapter.settings.ensure_weight_tying:
        raise BadDataError(
            f"{adapter.header.path} trains tied embeddings together (ensure_weight_tying), "
            "which merge does not support"
        )
    for name, change in changes.items():
        _check(name, change, base[tied if name == HEAD and tied else name], adapter)
    shards = [_shard(header, changes, tied if tied in header.tensors else None) for header in headers]
    untied = [header.path.name for header in headers if tied in header.tensors]
    return Plan(tuple(shards), untied[0] if untied else None)


def _located(adapter: Adapter, base: Mapping[str, Tensor]) -> dict[str, Change]:
    """Return the changes under the base's own tensor names.

    Some checkpoints, GPT-2's for one, leave out the model's own prefix (``transformer.``).
    """
    found = {}
    for name, change in adapter.changes.items():
        short = name.partition(".")[2]
        if name not in base and short in base:
            found[short] = change
        elif name in base or (name == HEAD and _embedding(base)):
            found[name] = change
        else:
            raise BadDataError(
                f"{adapter.header.path} was trained on another base: it changes {name}, which the base lacks"
            )
    return found


def _embedding(base: Mapping[str, Tensor]) -> str | None:
    names = [name for name in base if name.endswith(EMBEDDINGS)]
    return names[0] if len(names) == 1 else None


def _tied_embedding(base: Mapping[str, Tensor], changes: Mapping[str, Change]) -> str | None:
    """Return the shared embedding's name if the adapter tears it apart, else None."""
    embedding = _embedding(base)
    if HEAD in base or embedding is None:
        return None
    return embedding if changes.keys() & {HEAD, embedding} else None


def _check(name: str, change: Change, base: Tensor, adapter: Adapter) -> None:
    if base.dtype not in FLOATS:
        raise BadDataError(f"the base's {name} is of type {base.dtype}: merge into the unquantized base")
    for shape in (change.shape(), change.whole.shape if change.whole else None):
        if shape not in (None, base.shape):
            raise BadDataError(
                f"{adapter.header.path} was trained on another base: it changes {name} "
                f"as {list(shape or ())}, but the base's is {list(base.shape)}"
            )


def _shard(header: Header, changes: Mapping[str, Change], tied: str | None) -> Shard:
    places = [Place(name, tensor, changes.get(name), tensor.start) for name, tensor in header.tensors.items()]
    if tied is None:
        with header.path.open("rb") as source:
            return Shard(header.path, source.read(header.data_start), tuple(places))
    places.append(Place(HEAD, header.tensors[tied], changes.get(HEAD), header.size))
    text = _header(places, header.metadata, header.data_start)
    shift = len(text) - header.data_start
    moved = (replace(place, start=place.start + shift) for place in places)
    return Shard(header.path, text, tuple(moved))


def _header(places: Sequence[Place], metadata: Mapping[str, str], data_start: int) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for place in places:
        offset = place.start - data_start
        entries[place.name] = {
            "dtype": place.source.dtype,
            "shape": list(place.source.shape),
            "data_offsets": [offset, offset + place.source.size],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the first tensor to 8 bytes
    return struct.pack("<Q", len(text)) + text

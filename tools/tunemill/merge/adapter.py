"""Reads a PEFT LoRA adapter: which tensors of the model it changes, and how.

The names are those of the model's modules, as training saw them; ``places.py`` finds the tensors of the
base's files. PEFT's saved names have changed over the years, and a raw ``state_dict`` has the adapter's
name (``.default.``) in them; all are understood.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunemill.errors import BadDataError
from tunemill.merge.change import Change, Pair, Stored, Tokens
from tunemill.merge.settings import CONFIG, LoraSettings, read_settings
from tunemill.weights import Header, Tensor, read_header

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FLOATS = ("F32", "F16", "BF16")
EXPERTS = ("gate_up_proj", "down_proj")
"""Parameters of a mixture's ``experts``, in the order in which PEFT wraps them, the first innermost."""
NAMES = (
    (r"lora_A(?:\.default)?\.weight", ".weight", "a"),
    (r"lora_B(?:\.default)?\.weight", ".weight", "b"),
    (r"lora_B(?:\.default)?\.bias", ".bias", "added"),
    (r"lora_embedding_A(?:\.default)?", ".weight", "embedding_a"),
    (r"lora_embedding_B(?:\.default)?", ".weight", "embedding_b"),
    (r"lora_magnitude_vector(?:\.default)?(?:\.weight)?", ".weight", "magnitude"),
    (r"token_adapter\.trainable_tokens_delta(?:\.default)?", ".weight", "tokens"),
)
"""How the name of a part ends, the base's ending in its place, and the part it plays."""
WHOLE = ("plain", "saved", "base", "original")
"""Where a replaced tensor may stand, the trained first: resized embeddings are saved several times."""


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter, read but for its numbers."""

    header: Header
    settings: LoraSettings
    changes: Mapping[str, Change]
    """By the name that the tensor has in the model."""


def read_adapter(directory: Path) -> Adapter:
    """Read an adapter's configuration and header.

    Raises:
        BadDataError: it is damaged, incomplete, or of a kind this merge cannot apply.
    """
    settings = read_settings(directory / CONFIG)
    header = read_header(directory / WEIGHTS)
    parts: dict[str, dict[str, Stored]] = defaultdict(dict)
    for name, tensor in header.tensors.items():
        base_name, part = _part(name, settings, header.path)
        if part in parts[base_name]:
            raise BadDataError(f"{header.path} changes {base_name} twice")
        if tensor.dtype not in FLOATS:
            raise BadDataError(
                f"{header.path}: {name} is of type {tensor.dtype}, not one of {', '.join(FLOATS)}"
            )
        parts[base_name][part] = Stored(header.path, tensor)
    if not parts:
        raise BadDataError(f"{header.path} holds no tensors")
    sizes = settings.sizes([_key(name, settings) for name in parts])
    changes = {
        name: _change(name, found, settings, sizes[_key(name, settings)]) for name, found in parts.items()
    }
    return Adapter(header, settings, changes)


def _part(name: str, settings: LoraSettings, path: Path) -> tuple[str, str]:
    """Split an adapter's tensor name into the model's tensor name and the part it plays."""
    if not name.startswith(PREFIX):
        raise BadDataError(f"{path} holds {name!r}, which does not begin with {PREFIX}")
    for pattern, ending, part in NAMES:
        found = re.fullmatch(rf"(.+?)((?:\.base_layer)*)\.{pattern}", name.removeprefix(PREFIX))
        if found:
            module, wrapped = found[1], found[2].count("base_layer")
            experts = [key for key in EXPERTS if settings.targets_parameter(f"{module}.{key}")]
            if experts and module.endswith("experts") and wrapped < len(experts):
                return f"{module}.{experts[len(experts) - 1 - wrapped]}", part
            return module + ending, part
    if ".lora_" in name:
        raise BadDataError(f"{path} holds {name!r}, which merge does not support")
    return _replaced(name.removeprefix(PREFIX))


def _replaced(name: str) -> tuple[str, str]:
    """Return the model's name of a tensor that was trained whole, and where it stood."""
    for mark, part in (
        (r"\.modules_to_save(\.default)?\.", "saved"),
        (r"\.original_module\.", "original"),
        (r"(\.token_adapter)?\.base_layer\.", "base"),
    ):
        plain = re.sub(mark, ".", name)
        if plain != name:
            return plain, part
    return name, "plain"


def _key(name: str, settings: LoraSettings) -> str:
    """Return what patterns are matched with: a module, or a parameter that is trained as such."""
    return name if settings.targets_parameter(name) else name.rpartition(".")[0]


def _change(
    name: str, parts: Mapping[str, Stored], settings: LoraSettings, size: tuple[int, float]
) -> Change:
    whole = next((parts[part] for part in WHOLE if part in parts), None)
    pair = _pair(name, parts, settings, size)
    magnitude, tokens = parts.get("magnitude"), parts.get("tokens")
    if settings.use_dora and pair and magnitude is None:
        raise BadDataError(f"{CONFIG} sets use_dora, but {pair.a.path} lacks the magnitude of {name}")
    if magnitude and (pair is None or _count(magnitude.tensor) != pair.b.shape[0]):
        raise BadDataError(f"{magnitude.path} has a magnitude for {name} that fits no pair")
    return Change(
        whole=whole,
        pairs=(pair,) if pair else (),
        magnitude=magnitude,
        added=parts.get("added"),
        added_scale=size[1] if "added" in parts else 0.0,
        tokens=_tokens(name, tokens, settings) if tokens else None,
    )


def _pair(
    name: str, parts: Mapping[str, Stored], settings: LoraSettings, size: tuple[int, float]
) -> Pair | None:
    embedding = "embedding_a" in parts or "embedding_b" in parts
    a, b = (parts.get(f"embedding_{part}" if embedding else part) for part in "ab")
    if a is None and b is None:
        return None
    if a is None or b is None or (embedding and ("a" in parts or "b" in parts)):
        where = (a or b or next(iter(parts.values()))).path
        raise BadDataError(f"{where} holds only one half of the pair that changes {name}")
    rank, experts = size[0], 1
    if settings.targets_parameter(name) and not name.endswith(".weight") and len(a.shape) == 2:
        experts = max(1, a.shape[0] // rank)
    if not _fit(a.shape, b.shape, rank * experts):
        raise BadDataError(
            f"{a.path}: the pair for {name} has shapes {list(a.shape)} and {list(b.shape)}, "
            f"which is not the rank {rank} of {CONFIG}"
        )
    return Pair(a, b, size[1], embedding or settings.fan_in_fan_out, experts)


def _fit(a: Sequence[int], b: Sequence[int], rank: int) -> bool:
    """A convolution's factors have the kernel's dimensions besides; those of B are one."""
    dimensions = len(a) == len(b) and 2 <= len(a) <= 5
    return dimensions and a[0] == b[1] == rank and all(size == 1 for size in b[2:])


def _tokens(name: str, rows: Stored, settings: LoraSettings) -> Tokens:
    chosen = settings.tokens(name.rpartition(".")[0])
    count = rows.shape[0] if len(rows.shape) == 2 else 0
    if not chosen or len(chosen) != count or len(set(chosen)) != count or min(chosen) < 0:
        raise BadDataError(
            f"{rows.path}: {rows.tensor.name} has {count} rows, which are not those of the "
            f"{len(chosen)} trainable_token_indices of {CONFIG}"
        )
    return Tokens(tuple(chosen), rows)


def _count(tensor: Tensor) -> int:
    sizes = [size for size in tensor.shape if size != 1] or [1]
    return sizes[0] if len(sizes) == 1 else -1

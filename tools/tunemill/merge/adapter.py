"""Reads a PEFT LoRA adapter: which tensors of the base it changes, and how.

What PEFT supports and this merge does not is refused by name. Merging an adapter while ignoring
one of its settings would give a model that nobody trained.

Low rank: W' = W + s B A with s = alpha / r (Hu et al. 2021, arXiv:2106.09685), or alpha / sqrt(r)
(rsLoRA, Kalajdzievski 2023, arXiv:2312.03732).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tunemill.errors import BadDataError
from tunemill.weights import Header, Tensor, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_PATTERN = 200  # characters; PEFT takes these as regular expressions
FLOATS = ("F32", "F16", "BF16")

HARMLESS = frozenset(
    (
        *(
            "task_type",
            "auto_mapping",
            "peft_version",
            "base_model_name_or_path",
            "revision",
            "inference_mode",
        ),
        *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
        *("lora_dropout", "megatron_core", "eva_config", "qalora_group_size", "runtime_config"),
    )
)
"""Settings that matter while training and leave no trace beyond the adapter's tensors."""
OWN_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Initialisations that change the base's weights too, so that the published base is another."""


class LoraSettings(BaseModel):
    """The part of ``adapter_config.json`` that decides the result; the rest is in ``_refuse``."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    peft_type: str
    r: int
    lora_alpha: float
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    ensure_weight_tying: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}


@dataclass(frozen=True)
class Change:
    """What the adapter does to one tensor: replaces it, adds a product to it, or both."""

    whole: Tensor | None = None
    """Taken instead of the base's tensor."""
    a: Tensor | None = None
    """(r, in)"""
    b: Tensor | None = None
    """(out, r)"""
    scale: float = 0.0
    transposed: bool = False
    """The base holds (in, out): GPT-2's Conv1D, and embeddings."""

    def shape(self) -> tuple[int, ...] | None:
        """Return the shape the base's tensor must have, or None when only replaced."""
        if self.a is None or self.b is None:
            return None
        product = (self.b.shape[0], self.a.shape[1])
        return product[::-1] if self.transposed else product


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter, read but for its numbers."""

    header: Header
    settings: LoraSettings
    changes: Mapping[str, Change]
    """By the base's tensor name."""


def read_adapter(directory: Path) -> Adapter:
    """Read an adapter's configuration and header.

    Raises:
        BadDataError: it is damaged, incomplete, or of a kind this merge cannot apply.
    """
    settings = _settings(directory / CONFIG)
    header = read_header(directory / WEIGHTS)
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in header.tensors.items():
        base_name, part = _part(name, header.path)
        if part in parts[base_name]:
            raise BadDataError(f"{header.path} changes {base_name} twice")
        parts[base_name][part] = tensor
    if not parts:
        raise BadDataError(f"{header.path} holds no tensors")
    changes = {name: _change(name, found, settings, header.path) for name, found in parts.items()}
    return Adapter(header, settings, changes)


def _settings(path: Path) -> LoraSettings:
    try:
        raw = json.loads(path.read_text("utf-8"))
        settings = LoraSettings.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadDataError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadDataError(f"{path} cannot be read: {error}") from error
    _refuse(path, settings, raw)
    return settings


def _refuse(path: Path, settings: LoraSettings, raw: Mapping[str, Any]) -> None:
    known = LoraSettings.model_fields.keys() | HARMLESS
    for key, value in raw.items():
        if key not in known and value not in (None, False, {}, []):
            raise BadDataError(
                f"{path} sets {key}, which merge does not support; it merges plain LoRA and rsLoRA"
            )
    if settings.peft_type != "LORA":
        raise BadDataError(f"{path} is of type {settings.peft_type!r}; merge supports LORA")
    if settings.bias != "none":
        raise BadDataError(f"{path} trains biases (bias={settings.bias!r}), which merge does not support")
    initial = str(settings.init_lora_weights).lower()
    if initial.startswith(OWN_BASE):
        raise BadDataError(
            f"{path} was initialised by {initial}, which changes the base too: "
            "save it with PEFT's path_initial_model_for_weight_conversion and merge that"
        )
    numbers = [settings.lora_alpha, *settings.alpha_pattern.values()]
    if min(settings.r, *settings.rank_pattern.values(), 1) < 1 or not all(map(isfinite, numbers)):
        raise BadDataError(f"{path} has a rank below 1 or an alpha that is no number")


def _part(name: str, path: Path) -> tuple[str, str]:
    """Split an adapter's tensor name into the base's tensor name and the part it plays."""
    if not name.startswith(PREFIX):
        raise BadDataError(f"{path} holds {name!r}, which does not begin with {PREFIX}")
    name = name.removeprefix(PREFIX)
    for suffix, part in (
        (".lora_A.weight", "a"),
        (".lora_B.weight", "b"),
        (".lora_embedding_A", "embedding_a"),
        (".lora_embedding_B", "embedding_b"),
    ):
        if name.endswith(suffix):
            return name.removesuffix(suffix) + ".weight", part
    if ".lora_" in name:
        raise BadDataError(f"{path} holds {name!r}, which merge does not support; it merges plain LoRA")
    return name.replace(".modules_to_save.", ".").replace(".base_layer.", "."), "whole"


def _change(name: str, parts: Mapping[str, Tensor], settings: LoraSettings, path: Path) -> Change:
    for tensor in parts.values():
        if tensor.dtype not in FLOATS:
            raise BadDataError(
                f"{path}: {tensor.name} is of type {tensor.dtype}, not one of {', '.join(FLOATS)}"
            )
    embedding = "embedding_a" in parts or "embedding_b" in parts
    a, b = (parts.get(f"embedding_{part}" if embedding else part) for part in "ab")
    if (a is None) != (b is None) or (embedding and ("a" in parts or "b" in parts)):
        raise BadDataError(f"{path} holds only one half of the pair that changes {name}")
    if a is None or b is None:
        return Change(whole=parts["whole"])
    module = name.removesuffix(".weight")
    rank = _matched(settings.rank_pattern, module, settings.r)
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
        raise BadDataError(
            f"{path}: the pair for {name} has shapes {list(a.shape)} and {list(b.shape)}, "
            f"which is not the rank {rank} of {CONFIG}"
        )
    scale = _matched(settings.alpha_pattern, module, settings.lora_alpha)
    scale /= sqrt(rank) if settings.use_rslora else rank
    return Change(parts.get("whole"), a, b, scale, embedding or settings.fan_in_fan_out)


def _matched(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the first pattern's value that matches the end of a module's name, as PEFT does."""
    for pattern, value in patterns.items():
        if len(pattern) > MAX_PATTERN:
            raise BadDataError(f"{CONFIG} has a pattern of {len(pattern)} characters, above {MAX_PATTERN}")
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise BadDataError(f"{CONFIG} has the pattern {pattern!r}: {error}") from error
    return default

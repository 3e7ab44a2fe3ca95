"""Reads ``adapter_config.json``, and refuses by name what a merge would have to ignore.

Merging an adapter while ignoring one of its settings would give a model that nobody trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tunemill.errors import BadDataError
from tunemill.merge.patterns import first_matches

Number = TypeVar("Number", int, float)

CONFIG = "adapter_config.json"
MERGED = "LoRA, rsLoRA and DoRA"
HARMLESS = frozenset(
    (
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "target_modules", "exclude_modules", "modules_to_save", "bias"),
        *("layers_to_transform", "layers_pattern", "lora_dropout", "lora_bias", "megatron_core"),
        *("eva_config", "qalora_group_size", "runtime_config"),
    )
)
"""Settings that matter while training and leave no trace beyond the adapter's tensors."""
OWN_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Initialisations that change the base's weights too, so that the published base is another."""


MAX_RANK = 1 << 16  # no model is wider


class LoraSettings(BaseModel):
    """The part of ``adapter_config.json`` that decides the result; the rest is in ``_refuse``."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    peft_type: str
    r: int
    lora_alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    ensure_weight_tying: bool = False
    init_lora_weights: bool | str | None = True
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    def sizes(self, modules: Sequence[str]) -> dict[str, tuple[int, float]]:
        """Return the rank of each module's pair, and what its product is multiplied by.

        Raises:
            BadDataError: a pattern is no regular expression, or does not come to an end.
        """
        ranks = _values(self.rank_pattern, modules, self.r)
        alphas = _values(self.alpha_pattern, modules, self.lora_alpha)
        return {
            module: (rank, alpha / (sqrt(rank) if self.use_rslora else rank))
            for module, rank, alpha in zip(modules, ranks, alphas, strict=True)
        }

    def tokens(self, module: str) -> list[int]:
        """Return which rows of an embedding were trained alone; a tied one's are those of the other."""
        chosen = self.trainable_token_indices
        if not isinstance(chosen, dict):
            return chosen or []
        own = [found for key, found in chosen.items() if f".{module}".endswith(f".{key}")]
        return next(iter(own or chosen.values()), [])

    def targets_parameter(self, name: str) -> bool:
        """Return whether the adapter trains a parameter that is no layer of its own, as PEFT matches it."""
        return any(name == target or name.endswith(f".{target}") for target in self.target_parameters or ())


def read_settings(path: Path) -> LoraSettings:
    """Read an adapter's configuration.

    Raises:
        BadDataError: it is damaged, or asks for what this merge cannot do.
    """
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
            raise BadDataError(f"{path} sets {key}, which merge does not support; it merges {MERGED}")
    if settings.peft_type != "LORA":
        raise BadDataError(f"{path} is of type {settings.peft_type!r}; merge supports LORA")
    initial = str(settings.init_lora_weights).lower()
    if initial.startswith(OWN_BASE):
        raise BadDataError(
            f"{path} was initialised by {initial}, which changes the base too: "
            "save it with PEFT's path_initial_model_for_weight_conversion and merge that"
        )
    numbers = [settings.lora_alpha, *settings.alpha_pattern.values()]
    ranks = [settings.r, *settings.rank_pattern.values()]
    if not all(1 <= rank <= MAX_RANK for rank in ranks) or not all(map(isfinite, numbers)):
        raise BadDataError(
            f"{path} has a rank that is not within 1 and {MAX_RANK}, or an alpha that is no number"
        )


def _values(patterns: Mapping[str, Number], modules: Sequence[str], otherwise: Number) -> list[Number]:
    """Return for each module the value of the first pattern that it matches."""
    try:
        found = first_matches(list(patterns), modules)
    except BadDataError as error:
        raise BadDataError(f"{CONFIG} cannot be used: {error}") from error
    return [otherwise if pattern is None else patterns[pattern] for pattern in found]

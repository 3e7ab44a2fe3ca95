"""How much memory a training run needs at the very least, before a weight is loaded.

A lower bound from the headers of the base's files: weights, adapter, gradients, optimizer state
and the activations kept between layers. What is above the memory that is free cannot succeed,
and is refused in a second instead of failing after the model has been loaded. Below it, nothing is
promised.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunemill.errors import ConfigurationError
from tunemill.train.config import TrainBase
from tunemill.weights import read_headers

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FOUR_BIT_BYTES = 0.516  # 4 bits, and a doubly quantized constant for each block of 64 weights
NOT_LINEAR = re.compile(r"embed|lm_head|norm|wte|wpe|output\.weight")
PER_TRAINED = {"adamw": 16, "small": 8}
"""Bytes per trained weight: value, gradient and two moments in float32, or at least in 16 or 8 bits."""


@dataclass(frozen=True)
class Need:
    """Bytes that a run holds at once, each a lower bound."""

    weights: int
    training: int
    """Trained values, gradients, optimizer state."""
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.training + self.activations


def estimate(directory: Path, config: TrainBase, dtype: str) -> Need:
    """Return what training the base in ``directory`` needs at least.

    Raises:
        BadDataError: the base's weight files are damaged.
    """
    shapes = {
        name: tensor.shape for header in read_headers(directory) for name, tensor in header.tensors.items()
    }
    linear = [shape for name, shape in shapes.items() if len(shape) == 2 and not NOT_LINEAR.search(name)]
    total, in_linear = sum(map(_size, shapes.values())), sum(map(_size, linear))
    trained = total if config.method == "full" else _adapter_size(shapes, config)
    return Need(
        weights=_weight_bytes(total, in_linear, config.method, dtype),
        training=trained * PER_TRAINED[_optimizer_kind(config)],
        activations=_activation_bytes(directory, config, dtype),
    )


def check_fits(need: Need, free: int, where: str, config: TrainBase) -> None:
    """Refuse a run whose lower bound exceeds what is free.

    Raises:
        ConfigurationError: it does; names what to change.
    """
    if need.total <= free:
        return
    parts = f"weights {_gb(need.weights)}, training {_gb(need.training)}, activations {_gb(need.activations)}"
    raise ConfigurationError(
        f"training needs at least {_gb(need.total)} ({parts}) and {where} has {_gb(free)} free: "
        f"{_advice(need, config)}, or set memory_check=false to try"
    )


def free_memory(device: str) -> tuple[int, str]:
    """Return bytes that a new allocation may take on the device, and the device in words."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0]), torch.cuda.get_device_name()
    return min(_available(), _group_limit()), "this machine"


def peak_memory(device: str) -> int:
    """Return the most bytes this process has held: on the GPU if it trains there."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _weight_bytes(total: int, linear: int, method: str, dtype: str) -> int:
    if method == "full":
        return 0  # the trained values themselves
    if method == "qlora":
        return int(linear * FOUR_BIT_BYTES + (total - linear) * DTYPE_BYTES[dtype])
    return total * DTYPE_BYTES[dtype]


def _adapter_size(shapes: Mapping[str, tuple[int, ...]], config: TrainBase) -> int:
    """Weights of A (r, in) and B (out, r) of every adapted layer; 0 where a pattern decides."""
    lora = config.lora()
    targets = lora.get("target_modules", "all-linear")
    rank = lora.get("r", 8)
    if lora.get("rank_pattern") or not isinstance(rank, int):
        return 0
    adapted = [shape for name, shape in shapes.items() if _is_target(name, shape, targets)]
    return sum(rank * sum(shape) for shape in adapted)


def _is_target(name: str, shape: Iterable[int], targets: Any) -> bool:
    if len(tuple(shape)) != 2 or NOT_LINEAR.search(name):
        return False
    if targets == "all-linear":
        return True
    module = name.removesuffix(".weight")
    return isinstance(targets, list) and any(module.endswith(f".{target}") for target in targets)


def _optimizer_kind(config: TrainBase) -> str:
    if config.method == "qlora":
        return "small"  # TRL keeps an adapter over a quantized base in bfloat16, moments included
    optimizer = str(config.sft().get("optim", "adamw_torch_fused"))
    return "adamw" if optimizer in ("adamw_torch", "adamw_torch_fused", "adamw_hf") else "small"


def _activation_bytes(directory: Path, config: TrainBase, dtype: str) -> int:
    """One hidden state per layer, which even gradient checkpointing keeps; for 32 tokens a row."""
    try:
        shape = json.loads((directory / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return 0
    hidden, layers = shape.get("hidden_size"), shape.get("num_hidden_layers")
    rows = config.sft().get("per_device_train_batch_size", 8)
    if not all(isinstance(number, int) for number in (hidden, layers, rows)):
        return 0
    shortest = 32  # rows of the data may be far shorter than max_length
    return int(rows * shortest * hidden * layers * DTYPE_BYTES[dtype])


def _advice(need: Need, config: TrainBase) -> str:
    if config.method == "full":
        return "set method=lora or method=qlora"
    if need.activations > need.weights:
        return "set a smaller per_device_train_batch_size and gradient_accumulation_steps for the rest"
    if config.method == "lora":
        return "set method=qlora, or a smaller model or r"
    return "choose a smaller model or r"


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no Linux: all memory is the best bound there is
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group_limit(root: Path = Path("/sys/fs/cgroup")) -> int:
    """What the container may still take; a number beyond any memory where nothing limits it."""
    try:
        limit = (root / "memory.max").read_text("ascii").strip()
        used = int((root / "memory.current").read_text("ascii"))
    except (OSError, ValueError):
        return 1 << 62
    return 1 << 62 if limit == "max" else max(0, int(limit) - used)


def _size(shape: Iterable[int]) -> int:
    size = 1
    for dimension in shape:
        size *= dimension
    return size


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"

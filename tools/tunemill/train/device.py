"""What to compute on, in which type, and how to compute the same twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tunemill.train.config import TrainBase


def device_type(config: TrainBase) -> str:
    """Return ``cuda``, ``mps`` or ``cpu``: what this machine has, unless ``use_cpu`` is set."""
    import torch

    if config.sft().get("use_cpu"):
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def compute_dtype(config: TrainBase, device: str) -> str:
    """Return the type to compute in: as configured, else bfloat16 where it is native.

    On a CPU without bfloat16 multiplication it is emulated, and slower than float32.
    """
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if _has_bfloat16(device) else "float32"


def _has_bfloat16(device: str) -> bool:
    import torch

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device == "mps":
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "amx_tile"))


@contextmanager
def reproducible(wanted: bool) -> Iterator[None]:
    """Within the block torch takes deterministic kernels only, and raises where there is none."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    filling = _fills_memory()
    if wanted:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS asks for it, before its first use
        torch.use_deterministic_algorithms(True)
        _fill_memory(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        _fill_memory(filling)


def _fills_memory() -> bool:
    import torch.utils.deterministic

    return bool(torch.utils.deterministic.fill_uninitialized_memory)  # type: ignore[attr-defined]


def _fill_memory(wanted: bool) -> None:
    """Writing to fresh tensors before their first use helps finding bugs, and takes time."""
    import torch.utils.deterministic

    torch.utils.deterministic.fill_uninitialized_memory = wanted  # type: ignore[attr-defined]

"""How many GPUs and how much memory a stage's pod asks for, from its recipe and its inputs.

The tree's own amounts suit small models; what is known to need more asks for more. The numbers are
bounds to start with, and ``--gpus`` and ``--memory`` override them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from tunemill.errors import ConfigurationError, UsageError
from tunemill.kube.settings import Cluster
from tunemill.train.memory import FOUR_BIT_BYTES, PER_TRAINED

GIB = 1 << 30
ON_GPU = ("train", "gptq", "infer")
"""Stages that a GPU speeds up by more than waiting for one costs."""
WITH_CUDA = ("train", "gptq", "quantize", "infer")
"""Images that exist with CUDA."""

# Bytes of memory for each byte of the inputs' weights, beside what the program itself takes.
# merge and convert stream their tensors, but then put the probe set to what they made: with less than the
# whole of it in the page cache, each probe would read it from disk again. What quantize makes is smaller.
# Full training on a CPU holds value, gradient and two moments in float32 for weights stored in two bytes.
PER_INPUT_BYTE = {"train": 2.5, "convert": 1.2, "merge": 1.2, "imatrix": 1.2, "quantize": 0.5, "infer": 1.2}
FULL_TRAINING = 8.5
PROGRAM = 3 * GIB
LEAST_ON_GPU = {"qlora": FOUR_BIT_BYTES, "lora": 2.0, "full": float(PER_TRAINED["small"])}
"""Bytes of a GPU for each parameter, at the very least: every GPU of a training holds the whole model."""
QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(Ki|Mi|Gi|Ti|k|M|G|T)?")
UNITS = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": GIB,
    "Ti": 2**40,
}


def gpus_for(stage: str, given: int | None, cluster: Cluster) -> int:
    """Return how many GPUs a stage gets: those asked for, or one where the cluster has any to speed it up."""
    if given is not None:
        return given
    has_some = cluster.gpu is not None and cluster.gpu.count != 0
    return int(has_some and stage in ON_GPU)


def image_name(image: str, gpus: int) -> str:
    """Return the key of the image in cluster.yaml."""
    return f"{image}-cuda" if gpus and image in WITH_CUDA else image


def memory_for(stage: str, sizes: Mapping[str, int], settings: Mapping[str, object], gpus: int) -> int | None:
    """Return bytes of memory, or None where the inputs are not known or not large.

    ``sizes`` maps roles to bytes. On a GPU the weights pass through memory once.
    """
    weights = sum(size for role, size in sizes.items() if role in ("base", "adapter", "merged", "gguf"))
    if not weights or stage not in PER_INPUT_BYTE:
        return None
    factor = PER_INPUT_BYTE[stage]
    if stage == "train" and settings.get("method") == "full" and not gpus:
        factor = FULL_TRAINING
    if stage in WITH_CUDA and gpus:
        factor = min(factor, 1.25)
    return PROGRAM + int(weights * factor)


def check_gpu_memory(facts: Mapping[str, Any], settings: Mapping[str, Any], cluster: Cluster) -> None:
    """Refuse a training that no GPU of the cluster can hold, before it waits in a queue for one.

    ``facts`` are the base's. The training itself looks closer, at what is free on its GPU.

    Raises:
        ConfigurationError: the weights alone are larger than a GPU.
    """
    least = LEAST_ON_GPU.get(str(settings.get("method")))
    there = cluster.gpu.memory if cluster.gpu else None
    if not there or not least or not facts.get("parameters") or not settings.get("memory_check", True):
        return
    needed = int(facts["parameters"] * least)
    if needed > parse_quantity(there):
        raise ConfigurationError(
            f"method={settings['method']} needs at least {math.ceil(needed / GIB)}Gi on each GPU for a model "
            f"of {facts['parameters'] / 1e9:.1f} B parameters, and a GPU here has {there} (gpu.memory in "
            "cluster.yaml): set method=qlora or a smaller model, or memory_check=false to try"
        )


def work_for(sizes: Mapping[str, int]) -> int | None:
    """Return bytes of disk: the inputs, in the cache and linked from it, and an output no larger twice."""
    return 3 * sum(sizes.values()) + 2 * GIB if sizes else None


def at_least(wanted: int | None, present: str | None) -> str | None:
    """Return the larger of the two as a quantity in whole Gi; None when what is there suffices."""
    if wanted is None or (present and wanted <= parse_quantity(present)):
        return None
    return f"{math.ceil(wanted / GIB)}Gi"


def parse_quantity(text: str) -> int:
    """Return the bytes of a Kubernetes quantity such as ``16Gi``.

    Raises:
        UsageError: it is none.
    """
    found = QUANTITY.fullmatch(text.strip())
    if not found:
        raise UsageError(f"'{text}' is no amount of memory: for example 16Gi or 512Mi")
    return int(float(found[1]) * UNITS[found[2] or ""])

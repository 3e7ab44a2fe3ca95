"""Trainer checkpoints without pickles: what may be published, and back what the trainer reads.

The store takes no pickle, and a checkpoint may be resumed on another machine. The optimizer's,
scheduler's and random generators' states are nests of numbers and tensors: the tensors go to one
safetensors file, the rest to JSON that refers to them. ``restore`` writes, on the machine that
resumes, the files that transformers' Trainer looks for. What does not fit this form is an error,
never dropped: a state that lost a part would resume to a different result.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunemill.errors import BadDataError
from tunemill.files import write_json

PICKLED = re.compile(r"(optimizer|scheduler|scaler)\.pt|rng_state(_\d{1,6})?\.pth")
"""Names of what the Trainer writes with torch.save and reads back; each process has an rng_state."""
DROPPED = ("training_args.bin", "README.md")
"""Not read on resuming: the arguments come from the recipe."""
STATE, TENSORS = "state.json", "state.safetensors"


def export(checkpoint: Path, destination: Path, base: str) -> None:
    """Copy a Trainer checkpoint to ``destination``, its pickles as safetensors and JSON.

    The name of the ``base`` takes the place of the path that PEFT records.

    Raises:
        BadDataError: a state holds what neither can express.
    """
    import torch
    from safetensors.torch import save_file

    destination.mkdir(parents=True)
    tensors: dict[str, Any] = {}
    states = {}
    for path in sorted(checkpoint.iterdir()):
        if PICKLED.fullmatch(path.name):
            loaded = torch.load(path, map_location="cpu", weights_only=False)
            states[path.name] = encode(loaded, tensors)
        elif path.name not in DROPPED:
            shutil.copy2(path, destination / path.name)
    _forget_path(destination / "adapter_config.json", base)
    write_json(destination / STATE, states)
    save_file(tensors, destination / TENSORS)


def restore(saved: Path, destination: Path) -> None:
    """Turn what ``export`` wrote back into a Trainer checkpoint at ``destination``.

    Raises:
        BadDataError: the state is damaged.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    destination.mkdir(parents=True)
    try:
        states = json.loads((saved / STATE).read_text("utf-8"))
        tensors = load_file(saved / TENSORS)
        decoded = {name: decode(states[name], tensors) for name in states if PICKLED.fullmatch(name)}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BadDataError(f"the checkpoint cannot be read: {error}") from error
    for path in sorted(saved.iterdir()):
        if path.name not in (STATE, TENSORS):
            shutil.copy2(path, destination / path.name)
    for name, value in decoded.items():
        torch.save(value, destination / name)


def encode(value: Any, tensors: dict[str, Any]) -> Any:
    """Return ``value`` as JSON; its tensors and arrays are added to ``tensors`` under new names.

    Every container is written as ``[kind, content]``, so that tuples and integer keys survive.

    Raises:
        BadDataError: a value is of another type.
    """
    import numpy
    import torch

    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        pairs = [[encode(key, tensors), encode(item, tensors)] for key, item in value.items()]
        return ["dict", pairs]
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, [encode(item, tensors) for item in value]]
    if isinstance(value, torch.Tensor):
        return ["tensor", _keep(value, tensors)]
    if isinstance(value, numpy.ndarray):
        return ["array", str(value.dtype), _keep(torch.from_numpy(value.astype("int64")), tensors)]
    if isinstance(value, numpy.generic):
        return encode(value.item(), tensors)
    raise BadDataError(f"a checkpoint cannot hold a {type(value).__name__}: {value!r:.80}")


def decode(value: Any, tensors: Mapping[str, Any]) -> Any:
    """Return what ``encode`` was given."""
    if not isinstance(value, list):
        return value
    kind = value[0]
    if kind == "dict":
        return {decode(key, tensors): decode(item, tensors) for key, item in value[1]}
    if kind in ("list", "tuple"):
        items = [decode(item, tensors) for item in value[1]]
        return items if kind == "list" else tuple(items)
    if kind == "tensor":
        return tensors[value[1]]
    if kind == "array":
        return tensors[value[2]].numpy().astype(value[1])
    raise ValueError(f"unknown kind {kind!r}")


def _forget_path(config: Path, base: str) -> None:
    if config.exists():
        settings = json.loads(config.read_text("utf-8"))
        write_json(config, {**settings, "base_model_name_or_path": base})


def _keep(tensor: Any, tensors: dict[str, Any]) -> str:
    name = f"t{len(tensors)}"
    tensors[name] = tensor.detach().cpu().contiguous().clone()
    return name

"""Check the options of SFTConfig and LoraConfig by the libraries' own types and constructors.

A run that would fail on a misspelt value after an hour of downloading fails here in seconds:
nothing is read but the configuration. All problems are reported together, one per line.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.util
import tempfile
import typing
import warnings
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import (
    ConfigDict,
    PydanticSchemaGenerationError,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)

from tunemill.errors import ConfigurationError, UsageError
from tunemill.train.config import TrainBase
from tunemill.train.quiet import quieten

PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard"}
"""``report_to`` to the package that it needs."""

CONSTRUCTION_ERRORS = (ValueError, TypeError, KeyError, ImportError, NotImplementedError, RuntimeError)
"""What the two libraries' constructors raise for values that do not go together."""


def check(config: TrainBase) -> None:
    """Check everything that can be checked without weights or data.

    Raises:
        UsageError: values that the libraries refuse, one line each.
        ConfigurationError: a package is missing that the configuration asks for.
    """
    quieten()
    _check_packages(config)
    problems = list(_problems("trl.SFTConfig", _sft_class(), config.sft()))
    if config.method != "full":
        problems += _problems("peft.LoraConfig", _lora_class(), config.lora())
        if not problems and config.lora().get("r", 1) is not None and int(config.lora().get("r", 1)) < 1:
            problems.append(f"r={config.lora()['r']} is no rank of an adapter: give at least 1")
    if not problems:
        problems = list(_construction_problems(config))
    if problems:
        raise UsageError("\n".join(problems))


def sft_config(config: TrainBase, directory: Path, compute_dtype: str, device: str) -> Any:
    """Return the ``trl.SFTConfig`` of a run that keeps its own files in ``directory``.

    ``compute_dtype`` sets bf16 or fp16 where neither was set by name; ``device`` sets use_cpu,
    without which bf16 is refused on a CPU.
    """
    values = _converted(_sft_class(), config.sft())
    if "bf16" not in values and "fp16" not in values:
        values |= {"bf16": compute_dtype == "bfloat16", "fp16": compute_dtype == "float16"}
    values.setdefault("use_cpu", device == "cpu")
    return _sft_class()(
        output_dir=str(directory),
        seed=config.seed,
        max_length=config.max_length,
        report_to=[] if config.report_to == "none" else [config.report_to],
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        completion_only_loss=True,
        **values,
    )


def lora_config(config: TrainBase) -> Any:
    """Return the ``peft.LoraConfig``; all linear layers are adapted unless others are named."""
    values = {"target_modules": "all-linear"} | _converted(_lora_class(), config.lora())
    return _lora_class()(task_type="CAUSAL_LM", **values)


def _sft_class() -> Any:
    from trl import SFTConfig

    return SFTConfig


def _lora_class() -> Any:
    from peft import LoraConfig

    return LoraConfig


def _check_packages(config: TrainBase) -> None:
    package = PACKAGES.get(config.report_to)
    if package and importlib.util.find_spec(package) is None:
        raise ConfigurationError(
            f"report_to={config.report_to} needs the package {package}: pip install 'tunemill[tracking]'"
        )
    if config.method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigurationError("method=qlora needs the package bitsandbytes: pip install 'tunemill[train]'")


def _problems(title: str, library: Any, values: Mapping[str, Any]) -> Iterator[str]:
    types = _types(library)
    choices = {field.name: field.metadata.get("choices") for field in dataclasses.fields(library)}
    for name, value in values.items():
        allowed = choices[name] or _enumerated(types[name])
        if allowed and isinstance(value, str) and value not in allowed:
            yield f"{name}={value!r} is none of {title}'s choices{_nearest(value, allowed)}"
            continue
        try:
            _adapter(types[name]).validate_python(value)
        except ValidationError as error:
            reasons = dict.fromkeys(detail["msg"] for detail in error.errors())
            yield f"{name}={value!r} does not fit {title}: {' or '.join(reasons)}"


def _converted(library: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    types = _types(library)
    return {name: _adapter(types[name]).validate_python(value) for name, value in values.items()}


def _construction_problems(config: TrainBase) -> Iterator[str]:
    """What the constructors say about values that fit one by one but not together."""
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            sft_config(config, Path(directory), "float32", "cpu")
        except CONSTRUCTION_ERRORS as error:
            yield f"trl.SFTConfig refuses these options: {_one_line(error)}"
    if config.method != "full":
        try:
            lora_config(config)
        except CONSTRUCTION_ERRORS as error:
            yield f"peft.LoraConfig refuses these options: {_one_line(error)}"


def _types(library: Any) -> dict[str, Any]:
    return typing.get_type_hints(library)


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticUserError, PydanticSchemaGenerationError):
        return TypeAdapter(annotation)  # a dataclass or model of its own brings its own settings


def _enumerated(annotation: Any) -> list[str]:
    """The values of an enumeration that is written as ``SomeEnum | str``, which admits any text."""
    members = typing.get_args(annotation) or (annotation,)
    found = [item for item in members if isinstance(item, type) and issubclass(item, enum.Enum)]
    return [str(member.value) for item in found for member in item]


def _nearest(value: str, allowed: list[str]) -> str:
    near = get_close_matches(value, allowed, n=3)
    return f": did you mean {' or '.join(near)}?" if near else f": {', '.join(allowed)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())

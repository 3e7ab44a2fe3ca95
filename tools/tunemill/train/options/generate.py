"""List the fields of the installed SFTConfig and LoraConfig, so that others need not import them.

``fields.json`` lets a command know every option's name in milliseconds, where importing TRL
takes seconds. A test regenerates it, so it cannot fall behind the pinned libraries. Run
``python -m tunemill.train.options.generate`` after changing their versions.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from pathlib import Path
from typing import Any

from tunemill.files import write_json

FILE = Path(__file__).with_name("fields.json")


def fields() -> dict[str, dict[str, dict[str, str]]]:
    """Return ``{"sft" | "lora": {name: {"type", "default"}}}`` of the installed libraries."""
    from peft import LoraConfig
    from trl import SFTConfig

    return {"sft": _describe(SFTConfig), "lora": _describe(LoraConfig)}


def _describe(config: Any) -> dict[str, dict[str, str]]:
    return {
        field.name: {"type": _type_name(field.type), "default": _default(field)}
        for field in dataclasses.fields(config)
        if field.init
    }


def _type_name(annotation: Any) -> str:
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", name)


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING and field.default_factory in (list, dict):
        value = field.default_factory()
    else:
        return "the library's own"
    return str(value.value if isinstance(value, enum.Enum) else value)


if __name__ == "__main__":
    write_json(FILE, fields())

"""What a GGUF says of where it comes from: base model, data, licence, and the artifact it was made of.

The converter takes most of it from a file of overrides by llama.cpp's own keys; the licence it takes
from a model card alone, so one is put beside the model. The digest of the merged model's manifest is
in ``general.source.url``, from which ``tunemill store log`` leads to everything that went into it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunemill.files import read_object, write_json, write_text
from tunemill.work import Input

SCHEME = "tunemill:"
HUB = "https://huggingface.co/"
CARD = "card.json"
"""The data card, as prepare writes it."""


def write_origin(merged: Input, data: Input, staged: Path, overrides: Path) -> None:
    """Write ``overrides`` for the converter, and a card with the licence into the staged model.

    Raises:
        BadDataError: the data card is malformed.
    """
    base = merged.facts.get("base")
    base = base if isinstance(base, Mapping) else {}
    card = data.path / CARD
    write_json(overrides, _overrides(merged, base, read_object(card) if card.exists() else {}))
    if licence := base.get("license"):
        (staged / "README.md").unlink(missing_ok=True)
        write_text(staged / "README.md", f"---\nlicense: {json.dumps(str(licence))}\n---\n")


def _overrides(merged: Input, base: Mapping[str, Any], card: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "general.name": merged.reference.partition("/")[0],
        "general.source.url": SCHEME + merged.reference,
    }
    if base.get("name"):
        found["general.base_models"] = [_described(base.get("name"), base.get("commit"))]
    if card.get("dataset"):
        found["general.datasets"] = [_described(card.get("dataset"), card.get("revision"))]
    return found


def _described(name: object, version: object) -> dict[str, str]:
    """Return llama.cpp's description of a model or data set; of the Hub's with its address."""
    organization, slash, short = str(name).partition("/")
    if not slash or str(name).startswith(("/", ".", "~")) or "/" in short:
        return {"name": Path(str(name)).name}
    place = f"{HUB}{name}"
    described = {"name": short, "organization": organization, "repo_url": place}
    return described | ({"version": str(version)} if version else {})

"""The stages, in the order of the pipeline, each imported when it is asked for.

Summaries stand here too, so that ``tunemill --help`` imports no stage; a test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunemill.work import Stage


@dataclass(frozen=True)
class Listed:
    """Where a stage is declared."""

    where: str
    """``module:ATTRIBUTE`` of the ``Stage``."""
    summary: str


LISTED = {
    "fetch": Listed(
        "tunemill.data.config:FETCH", "Get base weights from the Hub or a directory, or make the tiny model"
    ),
    "prepare": Listed(
        "tunemill.data.config:PREPARE", "Turn a dataset into prompts, split it, and write its data card"
    ),
    "train": Listed("tunemill.train.config:STAGE", "Fine-tune the base model by LoRA, QLoRA or in full"),
    "merge": Listed(
        "tunemill.merge.config:STAGE",
        "Fold an adapter into its base model, shard by shard, without loading the model",
    ),
    "convert": Listed(
        "tunemill.gguf.config:CONVERT", "Convert a merged model to GGUF and prove that both tokenize alike"
    ),
    "convert-lora": Listed("tunemill.gguf.config:CONVERT_LORA", "Convert an adapter alone to a GGUF LoRA"),
    "imatrix": Listed(
        "tunemill.gguf.config:IMATRIX",
        "Measure on training prompts which columns of a model matter, for quantize",
    ),
    "quantize": Listed(
        "tunemill.gguf.config:QUANTIZE", "Quantize a GGUF on this machine, with llama.cpp's quantizer"
    ),
    "gptq": Listed(
        "tunemill.gptq.config:STAGE",
        "Quantize a merged model to 4 bits for transformers, by GPTQ on a CUDA GPU",
    ),
    "infer": Listed("tunemill.infer.config:STAGE", "Classify or generate over a dataset"),
    "evaluate": Listed("tunemill.evaluate.config:STAGE", "Judge predictions and write the report"),
}


def load_stage(name: str) -> Stage[Any]:
    """Import the declaration of one stage.

    Raises:
        KeyError: there is no such stage.
    """
    module, attribute = LISTED[name].where.split(":")
    stage: Stage[Any] = getattr(import_module(module), attribute)
    return stage


def load_stages() -> dict[str, Stage[Any]]:
    """Import every stage's declaration, in the order of the pipeline."""
    return {name: load_stage(name) for name in LISTED}


def known_keys() -> dict[str, tuple[str, ...]]:
    """Return every recipe key with the names of the stages that take it."""
    keys: dict[str, tuple[str, ...]] = {}
    for name, stage in load_stages().items():
        for key in stage.config.model_fields:
            keys[key] = (*keys.get(key, ()), name)
    return keys

"""Lays out a model or an adapter as llama.cpp's converter wants to find it, without copying weights.

A directory of links to the files, in which the few are rewritten that the converter would understand
otherwise than transformers does.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from math import sqrt
from pathlib import Path

from tunemill.errors import BadDataError
from tunemill.files import MAX_TOKENIZER, read_object, write_json

ADAPTER_CONFIG = "adapter_config.json"
MAX_LAYERS = 1 << 12  # the deepest have some 130
MAX_COUNT = 1 << 24  # of heads, experts, tokens in a vocabulary
MAX_RANK = 1 << 16  # no model is wider
MAX_ALPHA = 1e9  # nor is any scale near it; infinity and NaN are above


def stage_model(model: Path, staged: Path, weights: bool = True) -> Path:
    """Link a model's files into a directory of our own, with what the converter needs beside them.

    transformers 5 keeps added tokens in ``tokenizer.json`` alone; the converter reads those of a
    SentencePiece model from ``tokenizer_config.json``, where transformers 4 wrote them. Without them
    it would take ``<|user|>`` for ordinary text. Without ``weights`` it is enough for a vocabulary.

    Raises:
        BadDataError: the tokenizer's or the model's settings are malformed.
    """
    check_counts(model / "config.json")
    _link_files(model, staged, () if weights else ("*.safetensors", "*.safetensors.index.json"))
    config_file, tokenizer_file = model / "tokenizer_config.json", model / "tokenizer.json"
    if not (config_file.exists() and tokenizer_file.exists()):
        return staged
    config, tokenizer = read_object(config_file), read_object(tokenizer_file, MAX_TOKENIZER)
    if "added_tokens_decoder" in config or not isinstance(tokenizer.get("added_tokens"), list):
        return staged
    decoder = {}
    for token in tokenizer["added_tokens"]:
        if not isinstance(token, dict) or not isinstance(token.get("id"), int):
            raise BadDataError(f"{tokenizer_file} has an added token without a number: {str(token)[:80]}")
        decoder[str(token["id"])] = {key: value for key, value in token.items() if key != "id"}
    (staged / config_file.name).unlink()
    write_json(staged / config_file.name, config | {"added_tokens_decoder": decoder})
    return staged


def check_counts(path: Path) -> None:
    """Refuse a configuration that counts more layers than any model has: the converter names each tensor
    of each layer before it looks whether there is one, and would do so for hours.

    Raises:
        BadDataError: it does, or is malformed.
    """
    config = read_object(path)
    nested = [value for value in config.values() if isinstance(value, dict)]
    for key, value in (pair for one in (config, *nested) for pair in one.items()):
        if key.startswith(("num_", "n_", "vocab_")) and type(value) in (int, float):
            limit = MAX_LAYERS if key.endswith(("layers", "layer")) else MAX_COUNT
            if not 0 <= value <= limit:
                raise BadDataError(f"{path} has {key} {value!r:.40}, which no model has")


def stage_adapter(adapter: Path, staged: Path) -> Path:
    """Link an adapter's files, with an alpha that means the same to llama.cpp.

    llama.cpp scales each pair by alpha / rank and knows one alpha per file; rsLoRA's alpha /
    sqrt(rank) is the same as an alpha larger by sqrt(rank).

    Raises:
        BadDataError: no single alpha can say what the adapter's settings do.
    """
    config = read_object(adapter / ADAPTER_CONFIG)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    where = f"{adapter / ADAPTER_CONFIG}"
    if config.get("peft_type") != "LORA":
        raise BadDataError(f"{where} is no LORA adapter but {config.get('peft_type')!r:.40}")
    if not isinstance(rank, int) or not 0 < rank <= MAX_RANK:
        raise BadDataError(f"{where} has r {rank!r:.40}, which is no rank of a LoRA")
    if not isinstance(alpha, int | float) or not abs(alpha) <= MAX_ALPHA:
        raise BadDataError(f"{where} has lora_alpha {alpha!r:.40}, which is no scale of a LoRA")
    if config.get("alpha_pattern"):
        raise BadDataError(
            f"{where} has an alpha_pattern, which a GGUF LoRA cannot express: merge the adapter"
        )
    for key in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters"):
        if config.get(key):
            raise BadDataError(f"{where} sets {key}, which a GGUF LoRA cannot express: merge the adapter")
    _link_files(adapter, staged, ())
    if not config.get("use_rslora"):
        return staged
    if config.get("rank_pattern"):
        raise BadDataError(f"{where} has use_rslora and a rank_pattern, which a GGUF LoRA cannot express")
    (staged / ADAPTER_CONFIG).unlink()
    write_json(staged / ADAPTER_CONFIG, config | {"lora_alpha": alpha * sqrt(rank)})
    return staged


def _link_files(source: Path, staged: Path, without: Sequence[str]) -> None:
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    for path in source.iterdir():
        if not any(path.match(pattern) for pattern in without):
            (staged / path.name).symlink_to(path.resolve())

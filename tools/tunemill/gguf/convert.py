"""The convert stages: llama.cpp's own scripts in a bounded child, and the proof that they did well.

A merged model becomes a GGUF, an adapter a GGUF LoRA. The scripts know a hundred architectures and
are not rewritten here. What is added: inputs are proved whole before, the file is proved whole
after, and token ids of real prompts must agree with transformers'.
"""

from __future__ import annotations

import json
import shutil
from math import sqrt
from pathlib import Path
from typing import Any

from tunemill.errors import BadDataError
from tunemill.files import need_space, write_json
from tunemill.gguf.child import Limits, fail, machine_memory, run
from tunemill.gguf.config import ConvertConfig
from tunemill.gguf.header import GgufHeader, read_gguf
from tunemill.gguf.library import Library
from tunemill.gguf.quantize import PROMPTING, describe
from tunemill.gguf.source import find_source
from tunemill.gguf.tokens import check_tokens
from tunemill.prompting import read_prompting
from tunemill.weights import BITS, read_header, read_headers
from tunemill.work import Facts, Work

WIDTHS = {"f16": 16, "bf16": 16, "f32": 32, "q8_0": 8.5}
"""Bits per number of the matrices."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def check(config: ConvertConfig) -> None:
    """See that the converter is installed before any input is pulled.

    Raises:
        ConfigurationError: it is missing, or of another llama.cpp than the installed one.
    """
    find_source()


def convert(work: Work[ConvertConfig]) -> Facts:
    """Write ``model-<OUTTYPE>.gguf``, ``tokens.json`` and ``prompting.json`` into ``work.output``.

    Raises:
        BadDataError: the model is damaged or not supported by llama.cpp, or tokens differ.
        TransientError: the disk is full, or the time limit was reached.
    """
    model = work.inputs["merged"].path
    numbers = sum(
        tensor.size * 8 // BITS[tensor.dtype] for h in read_headers(model) for tensor in h.tensors.values()
    )
    prompting = read_prompting(model)
    expected = int(numbers * WIDTHS[work.config.outtype] / 8)
    need_space(work.output, expected)
    staged = stage_model(model, work.scratch / "model")
    target = work.output / f"model-{work.config.outtype.upper()}.gguf"
    arguments = ["convert_hf_to_gguf.py", str(staged), "--outfile", str(target)]
    header = _run(work, "merged", arguments, target, expected)
    tokens = check_tokens(
        model, target, work.inputs["data"].path, work.output, Library(work.scratch, work.stop)
    )
    prompting.save(work.output)
    return describe(header) | {"llama_cpp": find_source().version, "tokens": tokens}


def convert_lora(work: Work[ConvertConfig]) -> Facts:
    """Write ``model-LORA.gguf`` into ``work.output``: the adapter alone, for llama.cpp to apply.

    Raises:
        BadDataError: the adapter is damaged, of another base, or of a kind that llama.cpp cannot apply.
    """
    base, adapter = work.inputs["base"], work.inputs["adapter"]
    trained_on = adapter.facts.get("base_content")
    if trained_on not in (None, base.content):
        raise BadDataError(
            f"{adapter.reference} was not trained on {base.reference}: give the base it was trained on"
        )
    if not (adapter.path / ADAPTER_CONFIG).exists():
        raise BadDataError(f"{adapter.reference} is no LoRA adapter: it has no {ADAPTER_CONFIG}")
    header = read_header(adapter.path / ADAPTER_WEIGHTS)
    staged = stage_adapter(adapter.path, work.scratch / "adapter")
    target = work.output / "model-LORA.gguf"
    arguments = ["convert_lora_to_gguf.py", str(staged), "--base", str(base.path), "--outfile", str(target)]
    made = _run(work, "adapter", arguments, target, header.size)
    if (adapter.path / PROMPTING).exists():
        shutil.copyfile(adapter.path / PROMPTING, work.output / PROMPTING)
    return describe(made) | {"llama_cpp": find_source().version}


def _run(
    work: Work[ConvertConfig], role: str, arguments: list[str], target: Path, expected: int
) -> GgufHeader:
    """Run one of llama.cpp's scripts on an input and check the file it leaves."""
    script, *rest = arguments
    memory = int(work.config.convert_memory_gb * 1e9) or machine_memory()
    limits = Limits(work.config.convert_timeout, memory)
    command = [str(find_source().directory / script), *rest, "--outtype", work.config.outtype]
    with work.progress.task(f"convert {work.config.outtype}", expected, "B") as task:

        def tick() -> None:
            size = target.stat().st_size if target.exists() else 0
            if size > task.done:
                task.advance(min(size, expected) - task.done)

        ended = run(command, work.scratch / "converter", limits, work.stop, tick)
        fail(ended, f"llama.cpp's {script} refuses {work.inputs[role].reference}", limits)
        task.advance(expected - task.done)
    if not target.exists():
        raise BadDataError(f"llama.cpp's {script} wrote no file: {ended.log.strip().splitlines()[-1:]}")
    return read_gguf(target)


def stage_model(model: Path, staged: Path) -> Path:
    """Link a model's files into a directory of our own, with what the converter needs beside them.

    transformers 5 keeps added tokens in ``tokenizer.json`` alone; the converter reads those of a
    SentencePiece model from ``tokenizer_config.json``, where transformers 4 wrote them. Without them
    it would take ``<|user|>`` for ordinary text.
    """
    _link_files(model, staged)
    config_file, tokenizer_file = model / "tokenizer_config.json", model / "tokenizer.json"
    if not (config_file.exists() and tokenizer_file.exists()):
        return staged
    config, tokenizer = _json(config_file), _json(tokenizer_file)
    if "added_tokens_decoder" in config or not isinstance(tokenizer.get("added_tokens"), list):
        return staged
    decoder = {
        str(token["id"]): {**token, "id": None} for token in tokenizer["added_tokens"] if "id" in token
    }
    for token in decoder.values():
        del token["id"]
    (staged / config_file.name).unlink()
    write_json(staged / config_file.name, config | {"added_tokens_decoder": decoder})
    return staged


def stage_adapter(adapter: Path, staged: Path) -> Path:
    """Link an adapter's files, with an alpha that means the same to llama.cpp.

    llama.cpp scales each pair by alpha / rank and knows one alpha per file; rsLoRA's alpha /
    sqrt(rank) is the same as an alpha larger by sqrt(rank).

    Raises:
        BadDataError: no single alpha can say what the adapter's settings do.
    """
    config = _json(adapter / ADAPTER_CONFIG)
    where = f"{adapter / ADAPTER_CONFIG}"
    if config.get("alpha_pattern"):
        raise BadDataError(
            f"{where} has an alpha_pattern, which a GGUF LoRA cannot express: merge the adapter"
        )
    for key in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters"):
        if config.get(key):
            raise BadDataError(f"{where} sets {key}, which a GGUF LoRA cannot express: merge the adapter")
    _link_files(adapter, staged)
    if not config.get("use_rslora"):
        return staged
    if config.get("rank_pattern"):
        raise BadDataError(f"{where} has use_rslora and a rank_pattern, which a GGUF LoRA cannot express")
    (staged / ADAPTER_CONFIG).unlink()
    write_json(staged / ADAPTER_CONFIG, config | {"lora_alpha": config["lora_alpha"] * sqrt(config["r"])})
    return staged


def _link_files(source: Path, staged: Path) -> None:
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    for path in source.iterdir():
        (staged / path.name).symlink_to(path.resolve())


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadDataError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise BadDataError(f"{path} holds no JSON object")
    return value

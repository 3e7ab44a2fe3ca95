"""The gptq stage: GPTQModel's quantization of a merged model, calibrated on the task's own prompts.

Rounding errors of one column are made up for by the columns after it, weighted by how the layer's inputs
vary over the calibration rows (Frantar et al. 2022, arXiv:2210.17323). The result is a Hugging Face
directory, and is loaded once by transformers before it is published.

It needs a CUDA GPU and has not been run on one yet by those who wrote it.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tunemill.errors import BadDataError, ConfigurationError
from tunemill.files import need_space
from tunemill.gptq.calibration import calibration
from tunemill.gptq.config import GptqConfig
from tunemill.prompting import Prompting, read_prompting
from tunemill.tokenizer import load_tokenizer
from tunemill.weights import read_headers
from tunemill.work import Facts, Work

PACKAGES = ("torch", "transformers", "gptqmodel", "optimum")
"""The last is what transformers loads such a model with."""
OF_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def check(config: GptqConfig) -> None:
    """Refuse a machine that cannot do it, before any input is pulled.

    Raises:
        ConfigurationError: a package or a CUDA GPU is missing.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"gptq needs the Python package '{missing[0]}': pip install 'tunemill[gptq]'"
        )
    import torch

    if not torch.cuda.is_available():
        raise ConfigurationError(
            "gptq needs a CUDA GPU, and torch finds none here: take quantize, which needs none"
        )


def gptq(work: Work[GptqConfig]) -> Facts:
    """Write the quantized model, its tokenizer and ``prompting.json`` into ``work.output``.

    Raises:
        BadDataError: an input is damaged, or the result cannot be loaded or computes no numbers.
        ConfigurationError: a package or a CUDA GPU is missing.
        TransientError: the disk is full.
    """
    check(work.config)
    model = work.inputs["merged"].path
    size = sum(header.size for header in read_headers(model))
    need_space(work.output, size)  # the result is smaller; the embeddings stay as they are
    prompting, tokenizer = read_prompting(model), load_tokenizer(model)
    rows = calibration(work.inputs["data"].path, prompting, tokenizer, work.config.calibration_rows)
    with work.progress.task("gptq"):
        _quantize(work.config, model, rows, work.output)
    for name in OF_TOKENIZER:
        if (model / name).is_file():
            shutil.copyfile(model / name, work.output / name)
    prompting.save(work.output)
    headers = read_headers(work.output)
    prove_loads(work.output, prompting, tokenizer)
    made = sum(header.size for header in headers)
    return {
        "bits": work.config.bits,
        "group_size": work.config.group_size,
        "calibration_rows": len(rows),
        "calibration_tokens": sum(len(row["input_ids"]) for row in rows),
        "bytes": made,
        "bytes_before": size,
        "model_content": work.inputs["merged"].content,
    }


def _quantize(config: GptqConfig, model: Path, rows: list[dict[str, list[int]]], output: Path) -> None:
    import gptqmodel

    settings = gptqmodel.QuantizeConfig(
        bits=config.bits,
        group_size=config.group_size,
        desc_act=config.desc_act,
        sym=config.sym,
        damp_percent=config.damp_percent,
    )
    loaded = gptqmodel.GPTQModel.load(str(model), settings, trust_remote_code=False)
    loaded.quantize(rows, batch_size=config.batch_size)
    loaded.save(str(output))


def prove_loads(directory: Path, prompting: Prompting, tokenizer: Any) -> None:
    """Load a quantized model by transformers, on the GPU, and put one question to it.

    Raises:
        BadDataError: it cannot be loaded, or what it computes are no numbers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    text = prompting.prompt([{"role": "user", "content": "Which topic?"}])
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)], device="cuda")
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, device_map="cuda", local_files_only=True)
        with torch.inference_mode():
            logits = model(ids).logits
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise BadDataError(f"transformers cannot load what gptq has written: {reason}") from error
    if not bool(torch.isfinite(logits).all()):
        raise BadDataError("the quantized model computes no numbers: raise damp_percent or calibration_rows")

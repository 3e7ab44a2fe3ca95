"""The convert stages: llama.cpp's own scripts in a bounded child, and the proof that they did well.

A merged model becomes a GGUF, an adapter a GGUF LoRA. The scripts know a hundred architectures and
are not rewritten here. What is added: inputs are proved whole before, the file is proved whole
after, and token ids of real prompts must agree with transformers'.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tunemill.errors import BadDataError
from tunemill.files import need_space
from tunemill.gguf.child import Limits, fail, machine_memory, run
from tunemill.gguf.config import ConvertConfig
from tunemill.gguf.header import GgufHeader
from tunemill.gguf.library import Library
from tunemill.gguf.origin import write_origin
from tunemill.gguf.parity import prove_conversion
from tunemill.gguf.parts import read_model
from tunemill.gguf.quantize import PROMPTING, describe
from tunemill.gguf.source import find_source
from tunemill.gguf.staging import ADAPTER_CONFIG, stage_adapter, stage_model
from tunemill.gguf.tokens import check_tokens, collect_probes, expect_tokens
from tunemill.ggufs import find_gguf
from tunemill.parity.gate import unproved
from tunemill.prompting import read_prompting
from tunemill.weights import BITS, read_header, read_headers
from tunemill.work import Facts, Work

WIDTHS = {"f16": 16, "bf16": 16, "f32": 32, "q8_0": 8.5}
"""Bits per number of the matrices."""
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
    probes = collect_probes(work.inputs["data"].path, prompting)
    expected = int(numbers * WIDTHS[work.config.outtype] / 8)
    need_space(work.output, expected)
    staged = stage_model(model, work.scratch / "model")
    target = work.output / f"model-{work.config.outtype.upper()}.gguf"
    overrides = work.scratch / "overrides.json"
    write_origin(work.inputs["merged"], work.inputs["data"], staged, overrides)
    arguments = ["convert_hf_to_gguf.py", str(staged), "--outfile", str(target), "--metadata", str(overrides)]
    arguments += ["--split-max-size", work.config.split_max_size]
    with ThreadPoolExecutor(1) as pool:  # transformers takes seconds to import, the converter longer to run
        expecting = pool.submit(expect_tokens, model, probes, prompting)
        header = _run(work, "merged", arguments, target, expected, expecting)
    tokens = check_tokens(expecting.result(), header.path, work.output, Library(work.scratch, work.stop))
    prompting.save(work.output)
    facts = describe(header) | {"llama_cpp": find_source().version, "tokens": tokens}
    facts |= {"model_content": work.inputs["merged"].content}
    return facts | prove_conversion(work, header.path)


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
    facts = describe(made) | {"llama_cpp": find_source().version, "model_content": base.content}
    return facts | unproved("convert-lora", "an adapter alone answers nothing", work.progress)


def _run(
    work: Work[ConvertConfig],
    role: str,
    arguments: list[str],
    target: Path,
    expected: int,
    meanwhile: Future[Any] | None = None,
) -> GgufHeader:
    """Run one of llama.cpp's scripts on an input and check the file it leaves; an error ends both."""
    script, *rest = arguments
    memory = int(work.config.convert_memory_gb * 1e9) or machine_memory()
    limits = Limits(work.config.convert_timeout, memory)
    command = [str(find_source().directory / script), *rest, "--outtype", work.config.outtype]
    with work.progress.task(f"convert {work.config.outtype}", expected, "B") as task:

        def tick() -> None:
            if meanwhile is not None and meanwhile.done():
                meanwhile.result()
            size = sum(path.stat().st_size for path in target.parent.glob("*.gguf"))
            if size > task.done:
                task.advance(min(size, expected) - task.done)

        ended = run(command, work.scratch / "converter", limits, work.stop, tick)
        fail(ended, f"llama.cpp's {script} refuses {work.inputs[role].reference}", limits)
        task.advance(expected - task.done)
    first = find_gguf(target.parent) if any(target.parent.glob("*.gguf")) else None
    if first is None:
        raise BadDataError(f"llama.cpp's {script} wrote no file: {ended.log.strip().splitlines()[-1:]}")
    return read_model(first)

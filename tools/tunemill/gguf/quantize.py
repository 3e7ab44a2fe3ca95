"""The quantize stage: llama.cpp's own quantizer, on the machine that will run the result.

The output is proved whole by its header and loadable by loading it once with every tensor checked.
Which machine and build made it is recorded, because a quantization is trusted only where it was made.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from tunemill.errors import BadDataError, UsageError
from tunemill.files import need_space
from tunemill.gguf.child import read_end
from tunemill.gguf.config import QuantizeConfig
from tunemill.gguf.header import GgufHeader, read_gguf
from tunemill.gguf.imatrix import FILE as IMATRIX
from tunemill.gguf.library import Answer, Library
from tunemill.gguf.overrides import parse_overrides, refuse_unmatched
from tunemill.gguf.parity import prove_quantization
from tunemill.gguf.parts import read_model
from tunemill.gguf.types import NEED_IMATRIX, TENSORS_NEED_IMATRIX, file_type, tensor_type
from tunemill.ggufs import find_gguf
from tunemill.host import this_host
from tunemill.work import Facts, Work

PROMPTING = "prompting.json"
ROWS_KEPT = 1 << 30  # bytes of one tensor in memory; llama.cpp's own 8 GB are half of a usual machine
COUNTED = re.compile(r"^\[ *(\d+)/ *\d+\]", re.MULTILINE)
FALLBACK = re.compile(r"warning: (\S+) +- ncols +(\d+) not divisible by +(\d+) .*-> falling back to +(\S+)")


def check(config: QuantizeConfig) -> None:
    """Refuse unknown types before any input is pulled.

    Raises:
        UsageError: a type is unknown, or needs an importance matrix.
    """
    file_type(config.quant)
    for name in (config.output_tensor_type, config.token_embedding_type):
        if name is not None:
            tensor_type(name)
    chosen = [override.type for override in parse_overrides(config.tensor_type or ())]
    needy = [name for name in chosen if name in TENSORS_NEED_IMATRIX]
    if config.quant in NEED_IMATRIX:
        needy.insert(0, config.quant)
    if needy and not config.imatrix:
        raise UsageError(
            f"{needy[0]} needs an importance matrix: run imatrix, then add --set imatrix=true; "
            "Q2_K and IQ3_S do without"
        )


def quantize(work: Work[QuantizeConfig]) -> Facts:
    """Write ``model-<quant>.gguf`` into ``work.output``.

    Raises:
        BadDataError: the input is damaged or quantized already, or the output cannot be loaded.
        TransientError: the disk is full.
    """
    check(work.config)
    directory = work.inputs["gguf"].path
    source = read_model(find_gguf(directory))
    refuse_quantized(source)
    need_space(work.output, source.size)
    refuse_unmatched(
        parse_overrides(work.config.tensor_type or ()), [tensor.name for tensor in source.tensors]
    )
    target = work.output / f"model-{work.config.quant}.gguf"
    library = Library(work.scratch, work.stop)
    answer = _run(work, library, source, target)
    made = read_gguf(target)
    if made.metadata.get("general.file_type") != file_type(work.config.quant):
        raise BadDataError(f"{target.name} says it is {made.file_type}, not {work.config.quant}")
    library.load(target)
    if (directory / PROMPTING).exists():
        shutil.copyfile(directory / PROMPTING, work.output / PROMPTING)
    carried = {key: fact for key, fact in work.inputs["gguf"].facts.items() if key == "model_content"}
    return describe(made) | carried | _facts(work, source, answer) | prove_quantization(work, target)


def describe(header: GgufHeader) -> Facts:
    """Return what a GGUF is, for the facts of the stage that made it."""
    return {
        "file": header.path.name,
        "architecture": header.architecture,
        "file_type": header.file_type,
        "tensors": len(header.tensors),
        "tensor_types": header.types(),
        "bytes": header.size,
    }


def refuse_quantized(source: GgufHeader) -> None:
    """See that a GGUF holds a whole model in 16 or 32 bits.

    Raises:
        BadDataError: it is quantized, or an adapter.
    """
    quantized = sorted(set(source.types()) - {"F32", "F16", "BF16", "I32"})
    if quantized:
        raise BadDataError(
            f"{source.path.name} is quantized already ({', '.join(quantized)}): give the F16, BF16 or F32 one"
        )
    if source.metadata.get("general.type") == "adapter":
        raise BadDataError(f"{source.path.name} is an adapter: quantize the merged model")


def _run(work: Work[QuantizeConfig], library: Library, source: GgufHeader, target: Path) -> Answer:
    with work.progress.task(f"quantize {work.config.quant}", len(source.tensors), "tensors") as task:

        def tick() -> None:
            counted = COUNTED.findall(read_end(library.log))
            if counted and int(counted[-1]) > task.done:
                task.advance(int(counted[-1]) - task.done)

        answer = library.quantize(
            source.path, target, _settings(work.config), tick, _tensor_types(work.config), _imatrix(work)
        )
        task.advance(len(source.tensors) - task.done)
    return answer


def _settings(config: QuantizeConfig) -> dict[str, Any]:
    settings = {
        "ftype": file_type(config.quant),
        "nthread": config.n_threads or os.cpu_count() or 1,
        "pure": config.pure,
        "max_buf_size": ROWS_KEPT,
    }
    for key in ("output_tensor_type", "token_embedding_type"):
        if (name := getattr(config, key)) is not None:
            settings[key] = tensor_type(name)
    return settings


def _tensor_types(config: QuantizeConfig) -> list[tuple[str, int]]:
    return [override.entry for override in parse_overrides(config.tensor_type or ())]


def _imatrix(work: Work[QuantizeConfig]) -> Path | None:
    return work.inputs["imatrix"].path / IMATRIX if "imatrix" in work.inputs else None


def _facts(work: Work[QuantizeConfig], source: GgufHeader, answer: Answer) -> Facts:
    fallbacks = {
        name: f"{columns} columns are no multiple of {needed}: {chosen}"
        for name, columns, needed, chosen in FALLBACK.findall(answer.log)
    }
    if fallbacks:
        work.progress.say(
            f"{len(fallbacks)} of {len(source.tensors)} tensors have widths that {work.config.quant} cannot "
            f"take and got a larger type: {next(iter(fallbacks))} and others"
        )
    return {
        "llama_cpp": answer.llama["version"],
        "ggml": f"{answer.llama['ggml_version']} {answer.llama['ggml_commit']}",
        "system_info": answer.llama["system_info"].strip(" |"),
        "bytes_before": source.size,
        "host_class": this_host().host_class,
        "fallbacks": fallbacks,
    }

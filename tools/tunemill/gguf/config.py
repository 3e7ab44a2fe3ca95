"""Declares the stages behind the one door to llama.cpp: convert, convert-lora and quantize."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunemill.work import Stage, StageConfig

OutType = Literal["f16", "bf16", "f32", "q8_0"]


class ConvertConfig(StageConfig):
    """Settings of a conversion to GGUF."""

    outtype: OutType = Field(default="f16", description="type of the matrices, by llama.cpp's name")
    convert_memory_gb: float = Field(
        default=0,
        ge=0,
        description="memory limit of the converter in GB; 0 takes the machine's memory",
        json_schema_extra={"identity": False},
    )
    convert_timeout: float = Field(
        default=6 * 3600,
        gt=0,
        description="seconds after which the converter is stopped",
        json_schema_extra={"identity": False},
    )


class QuantizeConfig(StageConfig):
    """Settings of a quantization."""

    quant: str = Field(default="Q4_K_M", description="quantization type, by llama.cpp's name")
    pure: bool = Field(default=False, description="one type for all matrices, no better one for a few")
    output_tensor_type: str | None = Field(default=None, description="type of the output matrix, e.g. Q8_0")
    token_embedding_type: str | None = Field(default=None, description="type of the embeddings, e.g. Q8_0")
    n_threads: int = Field(
        default=0,
        ge=0,
        le=256,
        description="worker threads; 0 takes one per core",
        json_schema_extra={"identity": False},
    )


CONVERT = Stage(
    name="convert",
    summary="Convert a merged model to GGUF and prove that both tokenize alike",
    config=ConvertConfig,
    inputs={"merged": "{run}/merged", "data": "{run}/data"},
    output="{run}/gguf-{outtype}",
    kind="gguf",
    work="tunemill.gguf.convert:convert",
    check="tunemill.gguf.convert:check",
)

CONVERT_LORA = Stage(
    name="convert-lora",
    summary="Convert an adapter alone to a GGUF LoRA",
    config=ConvertConfig,
    inputs={"base": "base/{model}", "adapter": "{run}/adapter"},
    output="{run}/gguf-lora",
    kind="gguf",
    work="tunemill.gguf.convert:convert_lora",
    check="tunemill.gguf.convert:check",
)

QUANTIZE = Stage(
    name="quantize",
    summary="Quantize a GGUF on this machine, with llama.cpp's quantizer",
    config=QuantizeConfig,
    inputs={"gguf": "{run}/gguf-f16"},
    output="{run}/gguf-{quant}",
    kind="gguf",
    work="tunemill.gguf.quantize:quantize",
    check="tunemill.gguf.quantize:check",
    binds_host=True,
)

STAGES = (CONVERT, CONVERT_LORA, QUANTIZE)

"""Declares the stages behind the one door to llama.cpp: convert, convert-lora, imatrix and quantize."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunemill.parity.config import ParityConfig
from tunemill.work import Stage, StageConfig

OutType = Literal["f16", "bf16", "f32", "q8_0"]


class ConvertConfig(ParityConfig):
    """Settings of a conversion to GGUF."""

    outtype: OutType = Field(default="f16", description="type of the matrices, by llama.cpp's name")
    split_max_size: str = Field(
        default="0",
        pattern=r"^\d+[KMG]?$",
        description="largest part of a model that is written in several files, e.g. 5G; 0 writes one",
    )
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
    convert_max_mean_kl: float | None = Field(
        default=None, ge=0, description="most mean KL in nats to the merged model; by the type if not given"
    )
    convert_max_worst_kl: float | None = Field(
        default=None, ge=0, description="most KL in nats at any one position; by the type if not given"
    )
    convert_min_top1: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="least share of positions with the same likeliest token; by the type if not given",
    )
    convert_max_label_flips: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="largest share of prompts that get another label; by the type if not given",
    )
    convert_min_p_value: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="least p of McNemar's test where right labels were lost; by the type if not given",
    )


class Threads(StageConfig):
    """How much of the machine is used."""

    n_threads: int = Field(
        default=0,
        ge=0,
        le=256,
        description="worker threads; 0 takes one per core",
        json_schema_extra={"identity": False},
    )


class ImatrixConfig(Threads):
    """Settings of an importance matrix."""

    imatrix_prompts: int = Field(
        default=256, ge=1, le=1 << 16, description="how many training rows the model reads for it"
    )
    imatrix_context: int = Field(
        default=512, ge=16, le=1 << 16, description="most tokens of one of them; longer ones are cut off"
    )
    n_gpu_layers: int = Field(
        default=-1,
        ge=-1,
        description="layers computed on the GPU where llama.cpp was built for one; -1 for all",
        json_schema_extra={"identity": False},
    )


class QuantizeConfig(ParityConfig, Threads):
    """Settings of a quantization."""

    quant: str = Field(default="Q4_K_M", description="quantization type, by llama.cpp's name")
    pure: bool = Field(default=False, description="one type for all matrices, no better one for a few")
    output_tensor_type: str | None = Field(default=None, description="type of the output matrix, e.g. Q8_0")
    token_embedding_type: str | None = Field(default=None, description="type of the embeddings, e.g. Q8_0")
    tensor_type: tuple[str, ...] | None = Field(
        default=None,
        description="types of single tensors, as [PATTERN=TYPE, …]; a pattern is looked for in their names",
    )
    imatrix: bool = Field(
        default=False,
        description="round by the run's importance matrix (stage imatrix), which types below 3 bits need",
    )
    quantize_max_mean_kl: float | None = Field(
        default=None,
        ge=0,
        description="most mean KL in nats to the unquantized model; by the type if not given",
    )
    quantize_max_worst_kl: float | None = Field(
        default=None, ge=0, description="most KL in nats at any one position; by the type if not given"
    )
    quantize_min_top1: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="least share of positions with the same likeliest token; by the type if not given",
    )
    quantize_max_label_flips: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="largest share of prompts that get another label; by the type if not given",
    )
    quantize_min_p_value: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="least p of McNemar's test where right labels were lost; by the type if not given",
    )


def quantize_inputs(config: QuantizeConfig) -> dict[str, str] | None:
    """Return the inputs of a quantization by an importance matrix."""
    return {"gguf": "{run}/gguf-f16", "imatrix": "{run}/imatrix"} if config.imatrix else None


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

IMATRIX = Stage(
    name="imatrix",
    summary="Measure on training prompts which columns of a model matter, for quantize",
    config=ImatrixConfig,
    inputs={"gguf": "{run}/gguf-f16", "data": "{run}/data"},
    output="{run}/imatrix",
    kind="imatrix",
    work="tunemill.gguf.calibration:collect",
)

QUANTIZE = Stage(
    name="quantize",
    summary="Quantize a GGUF on this machine, with llama.cpp's quantizer",
    config=QuantizeConfig,
    inputs={"gguf": "{run}/gguf-f16"},
    output="{run}/gguf-{quant}",
    kind="gguf",
    work="tunemill.gguf.quantize:quantize",
    other_inputs="tunemill.gguf.config:quantize_inputs",
    check="tunemill.gguf.quantize:check",
    binds_host=True,
)

STAGES = (CONVERT, CONVERT_LORA, IMATRIX, QUANTIZE)

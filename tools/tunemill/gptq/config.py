"""Declares the gptq stage: a merged model in 4 bits, for transformers on an NVIDIA GPU."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunemill.work import Stage, StageConfig


class GptqConfig(StageConfig):
    """Settings of a GPTQ quantization; names are GPTQModel's where it has one."""

    bits: Literal[2, 3, 4, 8] = Field(default=4, description="bits of a weight")
    group_size: Literal[-1, 32, 64, 128] = Field(
        default=128, description="weights of a row that share a scale; -1 for the whole row"
    )
    desc_act: bool = Field(
        default=False, description="quantize the columns that matter most first; slower to compute with"
    )
    sym: bool = Field(default=True, description="scales around zero, as most kernels want them")
    damp_percent: float = Field(
        default=0.05, gt=0, lt=1, description="share of the Hessian's mean diagonal that is added to it"
    )
    calibration_rows: int = Field(
        default=256, ge=16, le=1 << 14, description="training rows whose activations decide the rounding"
    )
    batch_size: int = Field(
        default=4,
        ge=1,
        description="calibration rows computed together",
        json_schema_extra={"identity": False},
    )


STAGE = Stage(
    name="gptq",
    summary="Quantize a merged model to 4 bits for transformers, by GPTQ on a CUDA GPU",
    config=GptqConfig,
    inputs={"merged": "{run}/merged", "data": "{run}/data"},
    output="{run}/gptq",
    kind="gptq",
    work="tunemill.gptq.gptq:gptq",
    check="tunemill.gptq.gptq:check",
    binds_host=True,
)

"""Declares the merge stage: an adapter folded into the base it was trained on."""

from __future__ import annotations

from math import isfinite
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunemill.parity.config import ParityConfig
from tunemill.work import Stage

CombinationType = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")


class MergeConfig(ParityConfig):
    """Settings of the merge; those of parity decide whether the result is published."""

    n_threads: int = Field(
        default=0,
        ge=0,
        le=256,
        description="worker threads; 0 takes one per core, up to 8",
        json_schema_extra={"identity": False},
    )
    adapters: tuple[Annotated[str, Field(pattern=r"^[^{}\s]+$")], ...] = Field(
        default=(),
        description="several adapters of one base, by reference, that are made one instead of {run}/adapter",
        json_schema_extra={"identity": False},  # their contents are
    )
    adapter_weights: tuple[float, ...] = Field(
        default=(), description="what each of adapters counts; may be negative"
    )
    combination_type: CombinationType = Field(
        default="linear", description="how adapters are made one, as in PEFT's add_weighted_adapter"
    )
    density: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the numbers that ties, dare_* and magnitude_prune keep",
    )
    majority_sign_method: Literal["total", "frequency"] = Field(
        default="total", description="how ties and dare_ties elect a sign"
    )
    svd_rank: int | None = Field(default=None, ge=1, description="rank that svd keeps; default: the largest")
    dare_seed: int = Field(default=0, ge=0, description="seed of DARE's masks")
    qlora_base: Literal["auto", "16bit", "nf4"] = Field(
        default="auto",
        description="base for an adapter trained on 4 bits: as published, as training saw it, or the better "
        "of the two on the probes",
    )
    merge_max_mean_kl: float | None = Field(
        default=None, ge=0, description="most mean KL in nats to the trained model; 0.003 if not given"
    )
    merge_max_worst_kl: float | None = Field(
        default=None, ge=0, description="most KL in nats at any one position; 0.3 if not given"
    )
    merge_min_top1: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="least share of positions with the same likeliest token; 0.97 if not given",
    )
    merge_max_label_flips: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="largest share of prompts that get another label; 0.05 if not given",
    )
    merge_min_p_value: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="least p of McNemar's test where right labels were lost; 0.01 if not given",
    )

    @model_validator(mode="after")
    def _refuse(self) -> MergeConfig:
        if len(self.adapters) != len(self.adapter_weights):
            raise ValueError(
                f"adapters names {len(self.adapters)} and adapter_weights has {len(self.adapter_weights)} "
                "numbers: give each adapter one"
            )
        if not all(isfinite(weight) for weight in self.adapter_weights):
            raise ValueError("adapter_weights has to be numbers")
        if len(self.adapters) > 1 and self.combination_type in PRUNING and self.density is None:
            raise ValueError(f"combination_type={self.combination_type} needs density, such as 0.5")
        return self


def adapter_role(index: int) -> str:
    """Return what a merge of several adapters calls one of them."""
    return f"adapter-{index}"


def other_inputs(config: MergeConfig) -> dict[str, str] | None:
    """Return the inputs of a merge of several adapters."""
    if not config.adapters:
        return None
    named = {adapter_role(index): reference for index, reference in enumerate(config.adapters)}
    return {"base": "base/{model}", **named}


STAGE = Stage(
    name="merge",
    summary="Fold an adapter into its base model, shard by shard, without loading the model",
    config=MergeConfig,
    inputs={"base": "base/{model}", "adapter": "{run}/adapter"},
    output="{run}/merged",
    kind="merged",
    other_inputs="tunemill.merge.config:other_inputs",
    work="tunemill.merge.merge:merge",
    check="tunemill.merge.parity:check",
)

"""Declares the merge stage: an adapter folded into the base it was trained on."""

from __future__ import annotations

from pydantic import Field

from tunemill.parity.config import ParityConfig
from tunemill.work import Stage


class MergeConfig(ParityConfig):
    """Settings of the merge. None of them changes the result, but some whether it is published."""

    n_threads: int = Field(
        default=0,
        ge=0,
        le=256,
        description="worker threads; 0 takes one per core, up to 8",
        json_schema_extra={"identity": False},
    )
    merge_max_mean_kl: float = Field(
        default=0.01, ge=0, description="most mean KL in nats between trained and merged model"
    )
    merge_max_worst_kl: float = Field(default=0.5, ge=0, description="most KL in nats at any one position")
    merge_min_top1: float = Field(
        default=0.97, ge=0, le=1, description="least share of positions with the same likeliest token"
    )
    merge_max_label_flips: float = Field(
        default=0.05, ge=0, le=1, description="largest share of prompts that get another label"
    )
    merge_min_p_value: float = Field(
        default=0.01, ge=0, le=1, description="least p of McNemar's exact test where right labels were lost"
    )


STAGE = Stage(
    name="merge",
    summary="Fold an adapter into its base model, shard by shard, without loading the model",
    config=MergeConfig,
    inputs={"base": "base/{model}", "adapter": "{run}/adapter"},
    output="{run}/merged",
    kind="merged",
    work="tunemill.merge.merge:merge",
    check="tunemill.merge.parity:check",
)

"""Declares the merge stage: an adapter folded into the base it was trained on."""

from __future__ import annotations

from pydantic import Field

from tunemill.work import Stage, StageConfig


class MergeConfig(StageConfig):
    """Settings of the merge. None of them changes the result."""

    n_threads: int = Field(
        default=0,
        ge=0,
        le=256,
        description="worker threads; 0 takes one per core, up to 8",
        json_schema_extra={"identity": False},
    )


STAGE = Stage(
    name="merge",
    summary="Fold an adapter into its base model, shard by shard, without loading the model",
    config=MergeConfig,
    inputs={"base": "base/{model}", "adapter": "{run}/adapter"},
    output="{run}/merged",
    kind="merged",
    work="tunemill.merge.merge:merge",
)

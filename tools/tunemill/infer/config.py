"""Declares the infer stage: a prepared dataset through a GGUF, at once or in shards that are joined."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tunemill.infer.constraints import (
    KEYS,
    Constraint,
    constraint_of,
    read_choices,
    read_grammar,
    read_schema,
)
from tunemill.work import Stage, StageConfig

LEAST_BATCH = 64  # below it flash attention on a CPU takes another kernel, which rounds otherwise


class InferConfig(StageConfig):
    """Settings of an inference; names are llama.cpp's where it has one."""

    quant: str = Field(
        default="Q4_K_M",
        description="which quantization of the run to use; F16 for the unquantized one",
        json_schema_extra={"identity": False},  # the input's digest says more
    )
    lora: bool = Field(
        default=False,
        description="apply the run's GGUF LoRA to the GGUF of its base, which --input gguf=REF names",
    )
    split: Literal["train", "validation", "test", "unlabelled"] = Field(
        default="test", description="which rows to predict"
    )
    limit: int = Field(default=0, ge=0, description="predict the first rows only; 0 predicts all")
    n_ctx: int = Field(
        default=0,
        ge=0,
        description="most tokens of one prompt with its answer; 0 takes what the model was trained for",
    )
    n_batch: int = Field(
        default=0,
        ge=0,
        le=1 << 16,
        description="most tokens computed at once, from 64; 0 chooses, and more than 512 never are",
        json_schema_extra={"identity": False},
    )
    n_parallel: int = Field(
        default=0,
        ge=0,
        description="most texts computed at once in one context; 0 takes as many as fit",
        json_schema_extra={"identity": False},
    )
    calibration: Literal["none", "contextual"] = Field(
        default="none",
        description="contextual divides labels' probabilities by those they get for inputs without content",
    )
    decoding: Literal["likeliest", "greedy"] = Field(
        default="likeliest",
        description="which label answers: the likeliest, or the one that is written if every token is the "
        "likeliest that a label goes on with",
    )
    max_pruned: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="share of the probability that labels left uncomputed may have together; 0 computes all, "
        "which is the default for one label; for several it is 0.01",
    )
    max_new_tokens: int = Field(default=256, ge=1, description="most tokens of a free answer")
    temperature: float = Field(
        default=0.0, ge=0, le=10, description="spread of free answers; 0 takes the likeliest token each time"
    )
    seed: int = Field(default=42, ge=0, lt=1 << 63, description="seed of free answers above temperature 0")
    n: int = Field(
        default=1, ge=1, le=64, description="free answers to each prompt; several need a temperature"
    )
    top_k: int = Field(
        default=0, ge=0, description="draw free answers' tokens from the likeliest so many; 0 for all"
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="draw from the likeliest tokens that make up this share together"
    )
    min_p: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="draw from tokens at least this likely, as share of the likeliest",
    )
    stop: tuple[str, ...] = Field(
        default=(), description="texts before which a free answer ends; they are not part of it"
    )
    json_schema: dict[str, Any] | None = Field(
        default=None, description="schema that every free answer is JSON of: itself, or the name of a file"
    )
    regex: str | None = Field(
        default=None, min_length=1, description="regular expression that every free answer matches whole"
    )
    choices: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="the free answers there are"
    )
    grammar: str | None = Field(
        default=None, description="llama.cpp's grammar (GBNF) of every free answer: itself, or a file's name"
    )
    block_rows: int = Field(
        default=256, ge=1, le=1 << 16, description="rows saved together; a kill loses the unsaved ones"
    )
    reprove: bool = Field(
        default=False,
        description="prove a model that another kind of host quantized by its probe set, and go on",
        json_schema_extra={"identity": False},
    )
    shard_count: int = Field(
        default=1, ge=1, le=10_000, description="jobs that share the rows, each with a shard_index of its own"
    )
    shard_index: int | None = Field(
        default=None,
        ge=0,
        description="which shard to predict, from 0; without it the finished shards are joined",
    )
    flash_attn: bool = Field(
        default=False,
        description="llama.cpp's fused attention; on a CPU it rounds more and is a little faster",
    )
    n_gpu_layers: int = Field(
        default=-1,
        ge=-1,
        description="layers computed on the GPU where llama.cpp was built for one; -1 for all",
    )
    n_threads: int = Field(
        default=0,
        ge=0,
        le=256,
        description="worker threads; 0 takes one per core",
        json_schema_extra={"identity": False},
    )

    @model_validator(mode="after")
    def _refuse(self) -> InferConfig:
        if 0 < self.n_batch < LEAST_BATCH:
            raise ValueError(f"n_batch={self.n_batch} is less than {LEAST_BATCH}: raise it, or leave it 0")
        if self.shard_index is not None and self.shard_index >= self.shard_count:
            raise ValueError(
                f"shard_index={self.shard_index} is none of {self.shard_count} shards: they count from 0"
            )
        return self

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given

    _read_schema = field_validator("json_schema", mode="before")(read_schema)
    _read_grammar = field_validator("grammar", mode="before")(read_grammar)
    _read_choices = field_validator("choices", mode="before")(read_choices)

    @model_validator(mode="after")
    def _consistent(self) -> InferConfig:
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n={self.n} answers would be the same at temperature 0: set temperature")
        if self.max_pruned and self.calibration != "none":
            raise ValueError(
                f"max_pruned={self.max_pruned} leaves small probabilities uncertain, and "
                f"calibration={self.calibration} divides by small ones: leave one of them out"
            )
        if self.decoding == "greedy" and self.calibration != "none":
            raise ValueError(
                f"calibration={self.calibration} chooses the likeliest label, decoding=greedy the one that "
                "is written token by token: leave one of them out"
            )
        if not all(self.stop):
            raise ValueError("stop holds an empty text")
        constraint = self.constraint
        if constraint is not None:
            if self.stop:
                raise ValueError(
                    f"stop and {constraint.key} exclude each other: the grammar says where to end"
                )
            try:
                constraint.gbnf()
            except ValueError as error:
                raise ValueError(f"{constraint.key}: {error}") from error
        return self

    @property
    def constraint(self) -> Constraint | None:
        """What free answers are held to, if anything."""
        return constraint_of({key: getattr(self, key) for key in KEYS})

    @property
    def joins(self) -> bool:
        """Whether there is nothing to predict, but shards to join."""
        return self.shard_count > 1 and self.shard_index is None

    def naming(self) -> dict[str, str]:
        """Return what a shard's predictions are named after."""
        sharded = self.shard_count > 1 and self.shard_index is not None
        shard = f"-{self.shard_index}-of-{self.shard_count}" if sharded else ""
        return {"shard": f"{self.applied}{shard}"}

    @property
    def applied(self) -> str:
        """What the name of predictions says of an adapter that was applied, and of texts without labels."""
        return ("-lora" if self.lora else "") + ("-unlabelled" if self.split == "unlabelled" else "")


LORA = "lora"
"""Role of the GGUF LoRA."""


def other_inputs(config: InferConfig) -> dict[str, str] | None:
    """Return the inputs of a join, every shard's predictions; or those with a LoRA beside the model."""
    if config.joins:
        count, name = config.shard_count, f"{{run}}/predictions-{{quant}}{config.applied}"
        return {shard_role(index): f"{name}-{index}-of-{count}" for index in range(count)}
    return {**INPUTS, LORA: "{run}/gguf-lora"} if config.lora else None


def shard_role(index: int) -> str:
    """Return what a join calls a shard."""
    return f"shard-{index}"


INPUTS = {"gguf": "{run}/gguf-{quant}", "data": "{run}/data"}

STAGE = Stage(
    name="infer",
    summary="Classify or generate over a dataset",
    config=InferConfig,
    inputs=INPUTS,
    output="{run}/predictions-{quant}{shard}",
    kind="predictions",
    other_inputs="tunemill.infer.config:other_inputs",
    work="tunemill.infer.predict:predict",
    check="tunemill.infer.constraints:check",
    bound_inputs=("gguf",),
    stops_itself=True,
)

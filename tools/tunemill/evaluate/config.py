"""Declares the evaluate stage: predictions against gold, beside two baselines."""

from __future__ import annotations

from pydantic import Field

from tunemill.work import Stage, StageConfig


class EvaluateConfig(StageConfig):
    """Settings of an evaluation."""

    quant: str = Field(
        default="Q4_K_M",
        description="which quantization's predictions to judge",
        json_schema_extra={"identity": False},  # the input's digest says more
    )
    seed: int = Field(default=42, ge=0, lt=1 << 63, description="seed of the bootstrap")
    bootstrap_rounds: int = Field(
        default=2000, ge=100, le=100_000, description="resamples from which the intervals are read"
    )
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="share of resamples within an interval")
    tfidf_max_features: int = Field(
        default=30_000, ge=100, description="most words and word pairs of the TF-IDF baseline"
    )
    tfidf_max_rows: int = Field(
        default=20_000, ge=100, description="most training rows of the TF-IDF baseline, the first ones"
    )
    confusions: int = Field(default=8, ge=0, le=100, description="most frequent confusions shown with texts")
    corpus: str | None = Field(
        default=None,
        description="predictions of all texts, a reference: how common each label is among them is corrected "
        "for the errors seen on the judged rows",
        json_schema_extra={"identity": False},  # the input's digest says more
    )
    examples: int = Field(default=2, ge=0, le=20, description="example texts for each confusion shown")


def other_inputs(config: EvaluateConfig) -> dict[str, str] | None:
    """Return what is read where a corpus is given."""
    return None if config.corpus is None else {**INPUTS, "corpus": config.corpus}


INPUTS = {"predictions": "{run}/predictions-{quant}", "data": "{run}/data"}

STAGE = Stage(
    name="evaluate",
    summary="Judge predictions and write the report",
    config=EvaluateConfig,
    inputs=INPUTS,
    output="{run}/report-{quant}",
    kind="report",
    work="tunemill.evaluate.evaluate:evaluate",
    tells_origins=True,
    other_inputs="tunemill.evaluate.config:other_inputs",
)

"""What a step may change, and the settings that say so; imported by every ``--help``, so without NumPy."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from pydantic import Field

from tunemill.work import StageConfig


@dataclass(frozen=True)
class Limits:
    """What a stage may change at most."""

    max_mean_kl: float
    """Nats."""
    max_worst_kl: float
    """Nats, at any one position."""
    min_top1: float
    """Share of positions with the same likeliest token."""
    max_label_flips: float
    """Share of probes with another label."""
    min_p_value: float
    """Of McNemar's exact test, where the labels got worse."""


class ProbesConfig(StageConfig):
    """The setting that training and all who compare themselves with it share."""

    parity_probes: int = Field(
        default=64,
        ge=0,
        le=4096,
        description="Prompts that the models of all stages are compared on; 0: none",
    )


class ParityConfig(ProbesConfig):
    """Settings of every stage that compares itself with its input."""

    publish_anyway: bool = Field(
        default=False, description="Publish what is beyond its parity limits, and record that"
    )


def chosen_limits(config: ParityConfig, step: str, usual: Limits) -> Limits:
    """Return the usual limits with those that were set, by the fields ``merge_max_mean_kl`` and so on."""
    own = {field.name: getattr(config, f"{step}_{field.name}") for field in fields(Limits)}
    return replace(usual, **{name: value for name, value in own.items() if value is not None})

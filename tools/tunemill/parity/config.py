"""What a step may change, and the settings that say so; imported by every ``--help``, so without NumPy."""

from __future__ import annotations

from dataclasses import dataclass

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

    def limits(self, step: str) -> Limits:
        """Return the limits of a step from the fields named after it: ``merge_max_mean_kl`` and so on."""
        return Limits(**{name: getattr(self, f"{step}_{name}") for name in Limits.__dataclass_fields__})

"""What every form of answer needs to answer a block of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunemill.infer.calibration import Calibration
from tunemill.infer.config import InferConfig
from tunemill.infer.model import Model
from tunemill.infer.pool import Pool
from tunemill.infer.questions import Asker
from tunemill.task import Task


@dataclass(frozen=True)
class Run:
    """One inference over one dataset."""

    config: InferConfig
    model: Model
    pool: Pool
    asker: Asker
    task: Task
    calibration: Calibration | None = None
    """What labels' probabilities are divided by."""


def common_beginning(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the tokens all prompts begin with, short of any prompt's last one."""
    first, last = min(prompts), max(prompts)
    shortest = min(len(prompt) for prompt in prompts) - 1
    same = 0
    while same < shortest and first[same] == last[same]:
        same += 1
    return first[:same]

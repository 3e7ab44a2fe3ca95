"""A task's prompts about nothing, by which inference measures what a model answers whatever it is asked.

Contextual calibration (Zhao et al., 2021, arXiv 2102.09690) divides a label's probability by the one
that it gets for inputs without content. Only ``prepare`` knows which part of a prompt is content, so
it writes these prompts beside the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from tunemill.data.config import PrepareConfig
from tunemill.data.examples import Shape, read_examples
from tunemill.data.formats import first_values
from tunemill.data.labels import LabelSet
from tunemill.data.tables import Row

FILE = "content_free.json"
INPUTS: Final = ("N/A", "[MASK]", "")
"""The three of the paper."""


def content_free_prompts(
    rows: Sequence[Row], shape: Shape, labels: LabelSet, config: PrepareConfig
) -> list[dict[str, Any]]:
    """Return the task's prompt with every column empty of content, for each dimension there is."""
    answers = (shape.answer, *(config.dimensions or ()))
    given = dict.fromkeys((name for name in answers if name), labels.labels[0].name)
    columns = first_values(rows)
    asked = [Row("the prompt", "content-free", {**dict.fromkeys(columns, said), **given}) for said in INPUTS]
    return [
        {"dimension": example.dimension, "prompt": list(example.prompt)}
        for example in read_examples(asked, shape, labels, config)
    ]

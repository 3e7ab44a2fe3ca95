"""The memory of prepare grows with the texts, not with the prompts that are made of them."""

from __future__ import annotations

import csv
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from tunemill.work import Facts

DIMENSIONS = [f"dimension {number}" for number in range(46)]
LEVELS = ["low", "medium", "high"]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
LENGTH = 200  # words of a text


Prepare = Callable[[int], None]


@pytest.fixture
def prepare(prepared: Callable[..., tuple[Path, Facts]], tmp_path: Path) -> Prepare:
    """Prepare so many random texts, rated on 46 dimensions."""

    def run(texts: int) -> None:
        chance = random.Random(1)
        path = tmp_path / f"{texts}.csv"
        with path.open("w", newline="") as target:
            writer = csv.writer(target)
            writer.writerow(["text", *DIMENSIONS])
            for _ in range(texts):
                levels = chance.choices(LEVELS, k=len(DIMENSIONS))
                writer.writerow([" ".join(chance.choices(WORDS, k=LENGTH)), *levels])
        _, facts = prepared(
            f"output-{texts}", dataset_name=str(path), labels=LEVELS, dimensions=DIMENSIONS,
            prompt="{labels}? {text} {dimension}", near_duplicate_threshold=1.0,
        )  # fmt: skip
        assert sum(facts["rows"].values()) == texts * len(DIMENSIONS)

    return run


def peak(prepare: Prepare, texts: int) -> int:
    """Return how many bytes Python's objects take at most."""
    tracemalloc.start()
    try:
        prepare(texts)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_text_is_not_held_once_for_each_dimension(prepare: Prepare) -> None:
    few, many = 25, 50  # both are more rows than are rendered at once
    prepare(2)  # what is imported stays
    grown = (peak(prepare, many) - peak(prepare, few)) / (many - few)
    assert grown < len(DIMENSIONS) * LENGTH * min(map(len, WORDS))

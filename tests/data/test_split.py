"""Splits: whole groups, every label's share, the same for the same seed."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tunemill.data.examples import Example
from tunemill.data.split import split_examples


def examples(labels: list[str | None], splits: list[str | None] | None = None) -> list[Example]:
    given = splits or [None] * len(labels)
    return [
        Example(f"id-{n}", (), "", f"text {n}", label, f"row {n}", split)
        for n, (label, split) in enumerate(zip(labels, given, strict=True))
    ]


def many(seed: int) -> tuple[list[Example], list[int]]:
    source = random.Random(seed)
    labels: list[str | None] = [source.choice("aaaabbc") for _ in range(700)]
    groups = list(range(700))
    for position in range(1, 700):
        if source.random() < 0.3:
            groups[position] = groups[position - 1]
    return examples(labels), groups


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_whole_and_labels_keep_their_share(seed: int) -> None:
    rows, groups = many(seed)
    splits = split_examples(rows, groups, 0.2, 0.1, seed)
    for group in set(groups):
        assert len({split for split, one in zip(splits, groups, strict=True) if one == group}) == 1
    for split, share in (("test", 0.2), ("validation", 0.1)):
        labels = Counter(row.label for row, one in zip(rows, splits, strict=True) if one == split)
        for label, total in Counter(row.label for row in rows).items():
            assert labels[label] / total == pytest.approx(share, abs=0.06)


def test_the_seed_decides() -> None:
    rows, groups = many(1)
    one = split_examples(rows, groups, 0.2, 0.0, 1)
    assert one == split_examples(rows, groups, 0.2, 0.0, 1)
    assert one != split_examples(rows, groups, 0.2, 0.0, 2)


def test_adding_a_label_moves_no_row_of_another() -> None:
    rows = examples(["a"] * 50)
    more = examples(["a"] * 50 + ["b"] * 10)
    assert split_examples(rows, range(50), 0.2, 0, 1) == split_examples(more, range(60), 0.2, 0, 1)[:50]


def test_a_rare_label_is_held_out_once_but_not_wholly() -> None:
    splits = split_examples(examples(["a"] * 40 + ["b", "b", "c"]), range(43), 0.2, 0.1, 1)
    assert Counter(splits[40:42]) == {"train": 1, "test": 1}
    assert splits[42] == "train"


def test_a_given_test_set_is_kept() -> None:
    rows = examples([None] * 20, ["test" if n < 5 else None for n in range(20)])
    splits = split_examples(rows, range(20), 0.5, 0.2, 1)
    assert splits[:5] == ["test"] * 5
    assert Counter(splits[5:]) == {"train": 12, "validation": 3}


def test_nothing_is_held_out_when_nothing_is_asked() -> None:
    assert set(split_examples(examples(["a", "b"] * 5), range(10), 0.0, 0.0, 1)) == {"train"}

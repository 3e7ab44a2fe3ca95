"""What is computed together: every prompt whole, what prompts share once, and nothing beyond the bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tunemill.infer.packs import LATER, Bounds, Item, Pack, most_cells, packs
from tunemill.infer.trie import build_tries

LABELS = build_tries([[7, 2], [7, 3, 2], [9, 2]], 255)[0]
WIDE = Bounds(rows=10**6, beginning=0)


def items_of(prompts: list[list[int]], at_once: int = len(LABELS.tokens)) -> list[Item]:
    return [Item(number, tuple(prompt), LABELS, at_once) for number, prompt in enumerate(prompts)]


def texts(count: int, longest: int, seed: int = 1) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [[1, 2, 3, *random.integers(4, 9, random.integers(1, longest)).tolist()] for _ in range(count)]


def asked(count: int, dimensions: int, length: int) -> list[list[int]]:
    """Return texts of one length, each with several questions after it."""
    random = np.random.default_rng(2)
    return [
        [1, *text, 50 + dimension, 60, 61]
        for text in random.integers(4, 40, (count, length)).tolist()
        for dimension in range(dimensions)
    ]


def computed(pack: Pack) -> int:
    return sum(each.stop - each.start for item in pack.stretches() for each in item)


@pytest.mark.parametrize(
    "prompts",
    [
        pytest.param(texts(60, 40), id="short"),
        pytest.param(texts(9, 900), id="longer-than-a-pack"),
        pytest.param(asked(5, 12, 60), id="questions-about-texts"),
        pytest.param([[1, 2, 3]] * 5, id="all-the-same"),
        pytest.param([[5] * count for count in range(1, 30)], id="each-begins-the-next"),
    ],
)
def test_every_item_reads_its_whole_prompt(prompts: list[list[int]]) -> None:
    seen: dict[int, list[int]] = {}
    for pack in packs(items_of(prompts), WIDE):
        read: dict[int, list[int]] = {place: list(pack.prefix) for place in range(len(pack.items))}
        for place, stretches in enumerate(pack.stretches()):
            assert stretches[-1].stop == len(pack.items[place].prompt)  # the last token is its own
            for each in stretches:
                assert each.first == place
                for member in range(each.first, each.last + 1):
                    assert len(read[member]) == each.start
                    read[member] += pack.items[place].prompt[each.start : each.stop]
        seen |= {item.question: read[place] for place, item in enumerate(pack.items)}
    assert seen == dict(enumerate(prompts))


@pytest.mark.parametrize("prompts", [texts(80, 60), asked(6, 20, 90)], ids=["texts", "questions"])
@pytest.mark.parametrize("at_once", [0, len(LABELS.tokens)], ids=["labels-later", "labels-at-once"])
def test_packs_keep_within_their_bounds(prompts: list[list[int]], at_once: int) -> None:
    bounds = Bounds(rows=90, beginning=0)
    found = list(packs(items_of(prompts, at_once), bounds))
    assert len(found) > 1
    for pack in found:
        nodes = sum(item.nodes for item in pack.items)
        with_prompts = len(pack.items) * at_once
        assert len(pack.prefix) + computed(pack) + with_prompts <= most_cells(len(pack.prefix))
        assert nodes - with_prompts <= LATER
        assert len(pack.items) + nodes <= bounds.rows


def test_labels_computed_later_have_room_of_their_own() -> None:
    many = build_tries([[7, *[number] * 40, 2] for number in range(10, 14)], 255)[0]
    prompt = list(range(4, 10))
    items = [Item(number, (*prompt, number), many, 0) for number in range(20)]
    assert len(many.tokens) == 1 + 4 * 40
    assert [len(pack.items) for pack in packs(items, WIDE)] == [LATER // len(many.tokens)] * 6 + [2]


def test_a_text_is_computed_once_for_all_its_questions() -> None:
    prompts = asked(8, 46, 100)
    memory: tuple[int, ...] = ()
    total = 0
    for pack in packs(items_of(prompts), WIDE):
        kept = next(
            (n for n, pair in enumerate(zip(memory, pack.prefix, strict=False)) if len({*pair}) > 1),
            len(memory),
        )
        total += len(pack.prefix) - min(kept, len(pack.prefix)) + computed(pack)
        memory = pack.prefix
    once = 8 * 100 + len(prompts) * 3
    assert once <= total < 1.25 * once


def test_packs_depend_on_the_prompts_alone() -> None:
    items = items_of(texts(70, 50))
    shuffled: Any = np.random.default_rng(4).permutation(len(items))
    found = [pack.prefix + sum((item.prompt for item in pack.items), ()) for pack in packs(items, WIDE)]
    again = [
        pack.prefix + sum((item.prompt for item in pack.items), ())
        for pack in packs([items[number] for number in shuffled], WIDE)
    ]
    assert found == again

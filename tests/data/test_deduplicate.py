"""Repetitions are found, near ones grouped, and hashing invents none."""

from __future__ import annotations

import io
import random
from dataclasses import replace

import pytest

from tunemill.data.deduplicate import Duplicates, find_duplicates
from tunemill.data.examples import Example
from tunemill.progress import Progress

WORDS = [f"word{number}" for number in range(500)]


def example(number: int, text: str, label: str | None = "a", split: str | None = None) -> Example:
    prompt = ({"role": "user", "content": text},)
    return Example(f"id-{number}", prompt, label or "answer", text, label, f"row {number}", split)


def found(*examples: Example, threshold: float = 0.8) -> Duplicates:
    return find_duplicates(examples, threshold, Progress(io.StringIO(), quiet=True))


def sentence(source: random.Random, length: int = 40) -> list[str]:
    return source.choices(WORDS, k=length)


def test_an_exact_repetition_is_dropped_once() -> None:
    result = found(example(0, "Same  text"), example(1, "same\ntext"), example(2, "other"))
    assert result.dropped == {1}
    assert result.groups == (0, 0, 2)


def test_contradictions_are_kept_grouped_and_reported() -> None:
    result = found(example(0, "x y"), example(1, "x y", "b"), example(2, "z"))
    assert result.dropped == frozenset()
    assert result.groups == (0, 0, 2)
    assert result.contradictions == (("id-0", "id-1"),)


def test_a_given_test_row_stays_and_the_earlier_training_row_goes() -> None:
    result = found(example(0, "x y"), example(1, "x y", split="test"), example(2, "x y", split="test"))
    assert result.dropped == {0}


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_are_one_group_and_strangers_are_not(seed: int) -> None:
    source = random.Random(seed)
    originals = [sentence(source) for _ in range(60)]
    examples = [example(n, " ".join(words)) for n, words in enumerate(originals)]
    for number, words in enumerate(originals[:30]):
        changed = [*words]
        changed[source.randrange(len(words))] = "changed"
        examples.append(example(60 + number, " ".join(changed)))
    result = found(*examples)
    together = sum(result.groups[60 + number] == result.groups[number] for number in range(30))
    assert together == 30
    assert len(set(result.groups)) == 60
    assert result.dropped == frozenset()


def test_below_the_threshold_texts_stay_apart() -> None:
    words = sentence(random.Random(1))
    other = [*words]
    other[::8] = ["other"] * len(other[::8])  # 5 of 40 words: Jaccard of pairs about 0.6
    result = found(example(0, " ".join(words)), example(1, " ".join(other)))
    assert result.groups == (0, 1)
    result = found(example(0, " ".join(words)), example(1, " ".join(other)), threshold=0.4)
    assert result.groups == (0, 0)


def test_groups_are_chains() -> None:
    words = sentence(random.Random(2), 60)
    texts = [
        " ".join([f"new{n}" if n < step * 2 else word for n, word in enumerate(words)]) for step in range(6)
    ]
    result = found(*(example(n, text) for n, text in enumerate(texts)))
    assert set(result.groups) == {0}


def test_what_belongs_together_is_one_group() -> None:
    examples = [replace(example(n, f"text {n}"), belongs="ab"[n % 2]) for n in range(6)]
    assert found(*examples).groups == (0, 1, 0, 1, 0, 1)


def test_free_answers_to_one_question_are_all_kept() -> None:
    first, second = example(0, "Why?", None), example(1, "Why?", None)
    other = Example("id-1", second.prompt, "another answer", "Why?", None, "row 1", None)
    assert found(first, other).dropped == frozenset()
    assert found(first, second).dropped == {1}

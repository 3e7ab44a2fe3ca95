"""Finds texts that are the same, or nearly, so that none is both learnt from and tested on.

Candidates come from MinHash (Broder, 1997) with locality-sensitive hashing, from datasketch;
each is then verified by the exact Jaccard similarity of the two texts' sets of neighbouring
word pairs, so hashing may only miss a pair, never invent one. Groups are the connected parts.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from tunemill.data.examples import Example
from tunemill.progress import Progress

PERMUTATIONS: Final = 64
"""Enough, since every candidate is verified; 128 finds 1 % more pairs in twice the time."""

BATCH: Final = 1024


@dataclass(frozen=True)
class Duplicates:
    """What of the examples is repeated."""

    dropped: frozenset[int]
    """Positions of exact repetitions of an earlier example with the same answer."""
    groups: tuple[int, ...]
    """Per example, the position of the first example of its group."""
    contradictions: tuple[tuple[str, ...], ...] = field(default=())
    """Ids of examples with one and the same text but different labels."""


def find_duplicates(examples: Sequence[Example], threshold: float, progress: Progress) -> Duplicates:
    """Find exact and near duplicates; a given test row is never dropped, and counts as first.

    Args:
        examples: in the order that decides which of two repetitions stays.
        threshold: Jaccard similarity, 0 to 1, from which two texts are one group.
        progress: shows the search for near-duplicates.
    """
    normal = [_normal(example.text) for example in examples]
    order = sorted(range(len(examples)), key=lambda n: (examples[n].split != "test", n))
    same: dict[str, list[int]] = defaultdict(list)
    for position in order:
        same[normal[position]].append(position)
    belonging: dict[str, list[int]] = defaultdict(list)
    for position, example in enumerate(examples):
        if example.belongs is not None:
            belonging[example.belongs].append(position)
    parents = list(range(len(examples)))
    for positions in [*same.values(), *belonging.values()]:
        for position in positions[1:]:
            _join(parents, positions[0], position)
    first = [positions[0] for positions in same.values()]
    _join_similar(parents, [(n, _shingles(normal[n])) for n in sorted(first)], threshold, progress)
    return Duplicates(
        dropped=frozenset(n for positions in same.values() for n in _repeated(examples, positions)),
        groups=tuple(_root(parents, n) for n in range(len(examples))),
        contradictions=_contradictions(examples, same),
    )


def _repeated(examples: Sequence[Example], positions: list[int]) -> list[int]:
    """Positions whose text, prompt and answer an earlier one has, unless given as test."""
    seen: set[tuple[object, ...]] = set()
    repeated = []
    for position in positions:
        example = examples[position]
        answer = example.completion if example.label is None else example.label
        prompt = tuple(_normal(message["content"]) for message in example.prompt)
        if (prompt, answer) in seen and example.split != "test":
            repeated.append(position)
        seen.add((prompt, answer))
    return repeated


def _contradictions(examples: Sequence[Example], same: dict[str, list[int]]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        tuple(examples[n].id for n in sorted(positions))
        for positions in same.values()
        if len({examples[n].label for n in positions}) > 1
    )


def _join_similar(
    parents: list[int], texts: list[tuple[int, frozenset[bytes]]], threshold: float, progress: Progress
) -> None:
    from datasketch import MinHash, MinHashLSH

    if threshold >= 1:
        return  # equal texts are joined already
    # Missing a pair (the second weight) is worse than a candidate that verification refuses.
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
    shingles = dict(texts)
    with progress.task("compare texts", len(texts), "texts") as task:
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            hashes = MinHash.bulk([pair[1] for pair in batch], num_perm=PERMUTATIONS, seed=1)
            for (position, own), minhash in zip(batch, hashes, strict=True):
                for other in sorted(index.query(minhash)):
                    if _root(parents, other) != _root(parents, position) and (
                        _jaccard(own, shingles[other]) >= threshold
                    ):
                        _join(parents, other, position)
                index.insert(position, minhash)
            task.advance(len(batch))


def _jaccard(one: frozenset[bytes], other: frozenset[bytes]) -> float:
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def _shingles(text: str) -> frozenset[bytes]:
    """Pairs of neighbouring words: of 20 words one may differ at a threshold of 0.8."""
    words = text.split()
    if len(words) < 2:
        return frozenset([text.encode()])
    return frozenset(f"{one} {two}".encode() for one, two in pairwise(words))


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _root(parents: list[int], position: int) -> int:
    while parents[position] != position:
        parents[position] = parents[parents[position]]
        position = parents[position]
    return position


def _join(parents: list[int], one: int, other: int) -> None:
    low, high = sorted((_root(parents, one), _root(parents, other)))
    parents[high] = low

"""Finds texts that are the same, or nearly, so that none is both learnt from and tested on.

Candidates come from MinHash (Broder, 1997) with locality-sensitive hashing, from datasketch;
each is then verified by the Jaccard similarity of the two texts' sets of neighbouring word
pairs, so MinHash may only miss a pair, never invent one. Groups are the connected parts.
"""

from __future__ import annotations

import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Iterable, MutableSequence, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
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
    """Ids of examples with one and the same text, and dimension, but different labels."""


def find_duplicates(examples: Sequence[Example], threshold: float, progress: Progress) -> Duplicates:
    """Find exact and near duplicates; a given test row is never dropped, and counts as first.

    Args:
        examples: in the order that decides which of two repetitions stays.
        threshold: Jaccard similarity, 0 to 1, from which two texts are one group.
        progress: shows the search for near-duplicates.
    """
    known: dict[str, int] = {}  # every text once, however many dimensions it is asked about
    texts, parents, given_test = array("i"), array("i"), array("b")
    first: list[int] = []
    belonging: dict[str, int] = {}
    for position, example in enumerate(examples):
        text = known.setdefault(_normal(example.text), len(known))
        if text == len(parents):
            parents.append(text)
            first.append(position)
        texts.append(text)
        given_test.append(example.split == "test")
        if example.belongs is not None:
            _join(parents, belonging.setdefault(example.belongs, text), text)
    same: dict[int, array[int]] = defaultdict(lambda: array("i"))
    for wanted in (True, False):
        for position, text in enumerate(texts):
            if given_test[position] == wanted:
                same[text].append(position)
    if threshold < 1:  # else equal texts are all there is to find, and they are one
        _join_similar(parents, list(known), threshold, progress)
    several = [positions for positions in same.values() if len(positions) > 1]
    return Duplicates(
        dropped=frozenset(n for positions in several for n in _repeated(examples, positions)),
        groups=tuple(first[_root(parents, text)] for text in texts),
        contradictions=tuple(ids for positions in several for ids in _contradictions(examples, positions)),
    )


def _repeated(examples: Sequence[Example], positions: Sequence[int]) -> list[int]:
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


def _contradictions(examples: Sequence[Example], positions: Sequence[int]) -> Iterable[tuple[str, ...]]:
    apart: dict[str | None, list[tuple[int, str, str | None]]] = defaultdict(list)
    for position in positions:
        example = examples[position]
        apart[example.dimension].append((position, example.id, example.label))
    for asked in apart.values():
        if len({label for _, _, label in asked}) > 1:
            yield tuple(name for _, name, _ in sorted(asked))


def _join_similar(
    parents: MutableSequence[int], normal: Sequence[str], threshold: float, progress: Progress
) -> None:
    from datasketch import MinHash, MinHashLSH

    # Missing a pair (the second weight) is worse than a candidate that verification refuses.
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
    texts = _Shingled(normal)
    with progress.task("compare texts", len(normal), "texts") as task:
        for start in range(0, len(normal), BATCH):
            batch = range(start, min(start + BATCH, len(normal)))
            hashes = MinHash.bulk(
                [texts.hashes(n) for n in batch], num_perm=PERMUTATIONS, seed=1, hashfunc=_same
            )
            for own, minhash in zip(batch, hashes, strict=True):
                root = _root(parents, own)
                near = [n for n in index.query(minhash) if _root(parents, n) != root]
                for other in texts.similar(own, near, threshold):
                    _join(parents, other, own)
                index.insert(own, minhash)
            task.advance(len(batch))


class _Shingled:
    """The word pairs of many texts as numbers, to compare one with thousands at once.

    Boilerplate makes candidates of every pair of rows; set operations on ten thousand such rows
    took three minutes, counting marks takes seconds.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        import numpy

        found = [numpy.fromiter(_shingles(text), numpy.uint64) for text in texts]
        self._sizes = numpy.array([len(hashes) for hashes in found], dtype=numpy.int64)
        self._hashes, inverse = numpy.unique(
            numpy.concatenate([numpy.empty(0, numpy.uint64), *found]), return_inverse=True
        )
        self._numbers = numpy.split(inverse.astype(numpy.int32), numpy.cumsum(self._sizes)[:-1])
        self._marks = numpy.zeros(len(self._hashes), dtype=bool)

    def hashes(self, text: int) -> list[int]:
        """Return 32 bits of every word pair's hash, as MinHash takes them."""
        return [int(one) & 0xFFFFFFFF for one in self._hashes[self._numbers[text]]]

    def similar(self, own: int, others: Sequence[int], threshold: float) -> list[int]:
        """Return which of the other texts have at least this Jaccard similarity to one."""
        import numpy

        if not others:
            return []
        sizes = self._sizes[list(others)]
        flat = numpy.concatenate([self._numbers[other] for other in others])
        starts = numpy.concatenate([[0], numpy.cumsum(sizes)[:-1]])
        self._marks[self._numbers[own]] = True
        common = numpy.add.reduceat(self._marks[flat], starts, dtype=numpy.int64)
        self._marks[self._numbers[own]] = False
        jaccard = common / (self._sizes[own] + sizes - common)
        return [other for other, value in zip(others, jaccard, strict=True) if value >= threshold]


def _shingles(text: str) -> set[int]:
    """Pairs of neighbouring words, each as 64 bits of its hash.

    Of 20 words one may differ at a threshold of 0.8. A text of one word is its own shingle.
    """
    words = text.split()
    pairs = [f"{one} {two}" for one, two in pairwise(words)] or [text]
    return {int.from_bytes(sha256(pair.encode()).digest()[:8], "little") for pair in pairs}


def _same(value: int) -> int:
    return value


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _root(parents: MutableSequence[int], position: int) -> int:
    while parents[position] != position:
        parents[position] = parents[parents[position]]
        position = parents[position]
    return position


def _join(parents: MutableSequence[int], one: int, other: int) -> None:
    low, high = sorted((_root(parents, one), _root(parents, other)))
    parents[high] = low

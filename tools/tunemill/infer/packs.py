"""Which prompts are computed together, and what of them only once.

Prompts are put in the order of their tokens, so that those that begin alike are neighbours, and packed as
a tree: whatever neighbours of a pack begin with is computed once for all of them. Many questions about one
text cost the text once; a pack that begins where the one before began finds that beginning in memory.

A pack depends on the prompts and the bounds below alone, never on how many tokens or texts the host
computes at once. So the order in which tokens come into memory, which decides the last bits of their
attention, is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tunemill.infer.engine import CELL_STEP, MOST_SEQUENCES, alike
from tunemill.infer.trie import Trie

ROOM = 192
"""Tokens that a pack has room for at least. Attention costs every token as many cells as are in use, rounded
up to ``CELL_STEP``; so a pack ends there, and is no longer than needed to keep the multiplications busy."""
LATER = 512
"""Tokens of labels, computed after the prompts of a pack, that there is room for as well."""
WORTH_MOVING = 32  # tokens that a pack computes again rather than ending early


@dataclass(frozen=True)
class Item:
    """One prompt with labels to score after it."""

    question: int
    prompt: tuple[int, ...]
    trie: Trie
    at_once: int
    """Tokens of the labels that are computed with the prompt."""

    @property
    def nodes(self) -> int:
        """Tokens of the labels, those that may be computed later included."""
        return len(self.trie.tokens)


@dataclass(frozen=True)
class Stretch:
    """Tokens that consecutive items of a pack have in common, at the same place."""

    start: int
    """How many tokens of the prompt come before."""
    stop: int
    first: int
    """Place in the pack of the first item that has them: they are taken from its prompt."""
    last: int


@dataclass(frozen=True)
class Pack:
    """Items computed together."""

    items: tuple[Item, ...]
    prefix: tuple[int, ...]
    """What all their prompts begin with, short of any prompt's last token."""

    def stretches(self) -> Iterator[tuple[Stretch, ...]]:
        """Yield for each item the tokens of its prompt that no item before it has, in order."""
        prompts = [item.prompt for item in self.items]
        known = [len(self.prefix), *(_known(*pair) for pair in pairwise(prompts))]
        for first, prompt in enumerate(prompts):
            stop, last, found = len(prompt), first, list[Stretch]()
            while last + 1 < len(prompts) and known[last + 1] > known[first]:
                if known[last + 1] < stop:
                    found.append(Stretch(known[last + 1], stop, first, last))
                    stop = known[last + 1]
                last += 1
            yield tuple(reversed([*found, Stretch(known[first], stop, first, last)]))


@dataclass(frozen=True)
class Bounds:
    """What a pack may take."""

    rows: int
    """Logits, one for each prompt and each node of its labels."""
    beginning: int
    """Tokens that all prompts of all packs begin with, which are in memory anyway."""


def most_cells(prefix: int) -> int:
    """Return how many tokens a pack of several items has with its prefix at most."""
    return -(-(prefix + ROOM) // CELL_STEP) * CELL_STEP


def packs(items: Sequence[Item], bounds: Bounds) -> Iterator[Pack]:
    """Pack items. One that needs more than there is room for gets a pack of its own."""
    ordered = sorted(items, key=lambda item: (item.prompt, item.question))
    known = [0, *(_known(*pair) for pair in pairwise(item.prompt for item in ordered))]
    start, carried = 0, bounds.beginning
    while start < len(ordered):
        stop = _end(ordered, known, start, carried, bounds)
        pack = _pack(ordered[start:stop], carried)
        yield pack
        if stop < len(ordered):
            carried = max(bounds.beginning, alike(pack.prefix, ordered[stop].prompt))
        start = stop


def _known(before: tuple[int, ...], prompt: tuple[int, ...]) -> int:
    """Return how many tokens of a prompt need not be computed after another; its last one always is."""
    return min(alike(before, prompt), len(prompt) - 1)


def _pack(items: Sequence[Item], carried: int) -> Pack:
    first, last = items[0].prompt, items[-1].prompt
    if len(items) == 1:  # to compute its prompt apart from its labels would only cost another batch
        return Pack(tuple(items), first[: min(carried, len(first) - 1)])
    shortest = min(len(item.prompt) for item in items) - 1
    return Pack(tuple(items), first[: min(alike(first, last), shortest)])


def _end(items: Sequence[Item], known: Sequence[int], start: int, carried: int, bounds: Bounds) -> int:
    """Return which item is the first that does not belong to the pack from ``start`` on."""
    first = items[start]
    prefix = len(first.prompt) - 1
    tokens, sequences, rows = 1 + first.at_once, first.trie.sequences, 1 + first.nodes
    later = first.nodes - first.at_once
    for stop in range(start + 1, len(items)):
        item = items[stop]
        shorter = min(prefix, known[stop])
        tokens += prefix - shorter + len(item.prompt) - known[stop] + item.at_once
        later += item.nodes - item.at_once
        sequences += item.trie.sequences
        rows += 1 + item.nodes
        prefix = shorter
        full = tokens > _room(prefix) or later > LATER or sequences > MOST_SEQUENCES or rows > bounds.rows
        if full or min(carried, len(first.prompt) - 1) - prefix > WORTH_MOVING:
            return _joint(known, start, stop, prefix)
    return len(items)


def _joint(known: Sequence[int], start: int, stop: int, prefix: int) -> int:
    """Return where to end a pack that is full at ``stop``: at the last place where little is shared."""
    if known[stop] - prefix <= WORTH_MOVING:
        return stop
    little = (place for place in range(stop - 1, start, -1) if known[place] - prefix <= WORTH_MOVING)
    return next(little, stop)


def _room(prefix: int) -> int:
    return most_cells(prefix) - prefix

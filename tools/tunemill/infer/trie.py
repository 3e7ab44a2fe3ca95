"""All labels' tokens as one tree, so that what labels share is evaluated once.

A node stands for a token that something follows; the last token of a label needs no evaluation,
only its probability at the node before. Every chain of nodes that no other extends gets a
sequence of its own in llama.cpp's memory; a shared node belongs to all sequences through it.
A *place* is where logits are read: 0 is the prompt's last token, where every label begins, then
come the nodes, each plus one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Trie:
    """Labels' token ids as evaluated nodes and the look-ups that give each label's score."""

    tokens: Ints
    """``(nodes,)`` token ids, parents before children."""
    depths: Ints
    """``(nodes,)`` tokens after the prompt: 0 for a label's first."""
    counts: Ints
    """``(nodes,)`` how many sequences each node belongs to."""
    members: Ints
    """``(sum of counts,)`` those sequences, node after node; sequences count from 0."""
    sequences: int
    """Sequences needed, at least 1 (the prompt itself needs one)."""
    labels: tuple[int, ...]
    """Which labels (positions in the whole list) this tree scores, ascending."""
    lengths: npt.NDArray[np.intp]
    """``(labels,)`` tokens of each label, which are as many steps."""
    look_up_place: npt.NDArray[np.intp]
    """``(steps,)`` place whose distribution a step reads, label after label, each from its first token on."""
    look_up_token: npt.NDArray[np.intp]
    """``(steps,)`` token whose log-probability the step reads."""
    followers: tuple[int, ...]
    """``(places,)`` the place that all labels through one go on with; 0 where they part, or one ends."""

    @property
    def trunk(self) -> int:
        """How many nodes all labels begin with."""
        return len(self.chain(0)) - 1

    def chain(self, place: int) -> list[int]:
        """Return a place and those that all labels through it go on with."""
        found = [place]
        while following := self.followers[found[-1]]:
            found.append(following)
        return found

    def members_of(self, node: int) -> Ints:
        """Return the sequences of one node."""
        return self.members[self._starts[node] : self._starts[node + 1]]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *np.cumsum(self.counts).tolist()]


def build_tries(labels: Sequence[Sequence[int]], most_sequences: int) -> tuple[Trie, ...]:
    """Build as few trees as hold all labels with at most ``most_sequences`` sequences each.

    Every label needs at least one token. Labels are taken in the order of their tokens, so that
    what begins alike stays in one tree.
    """
    order = sorted(range(len(labels)), key=lambda label: tuple(labels[label]))
    groups = [order[start : start + most_sequences] for start in range(0, len(order), most_sequences)]
    return tuple(_build(labels, tuple(sorted(group))) for group in groups)


@dataclass
class _Growth:
    """Nodes while a tree grows: ``places`` maps a path of tokens to its place."""

    places: dict[tuple[int, ...], int] = field(default_factory=lambda: {(): 0})
    steps: list[tuple[int, int]] = field(default_factory=list)
    after: list[set[int]] = field(default_factory=lambda: [set()])
    """By place, those that come after it; 0 for the end of a label."""

    def add(self, tokens: tuple[int, ...]) -> None:
        place = 0
        for depth, token in enumerate(tokens):
            self.steps.append((place, token))
            following = 0
            if depth + 1 < len(tokens):
                following = self.places.setdefault(tokens[: depth + 1], len(self.places))
            if following == len(self.after):
                self.after.append(set())
            self.after[place].add(following)
            place = following


def _build(labels: Sequence[Sequence[int]], chosen: tuple[int, ...]) -> Trie:
    growth = _Growth()
    for label in chosen:
        growth.add(tuple(labels[label]))
    paths = list(growth.places)[1:]
    members = _members(paths)
    steps = np.array(growth.steps, dtype=np.intp).reshape(-1, 2)
    return Trie(
        tokens=np.array([path[-1] for path in paths], dtype=np.int32),
        depths=np.array([len(path) - 1 for path in paths], dtype=np.int32),
        counts=np.array([len(through) for through in members], dtype=np.int32),
        members=np.array([sequence for through in members for sequence in through], dtype=np.int32),
        sequences=max((through[-1] + 1 for through in members), default=1),
        labels=chosen,
        lengths=np.array([len(labels[label]) for label in chosen], dtype=np.intp),
        look_up_place=steps[:, 0],
        look_up_token=steps[:, 1],
        followers=tuple(next(iter(after)) if len(after) == 1 else 0 for after in growth.after),
    )


def _members(paths: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Give each path that no other extends a sequence, and each node all those through it."""
    inner = {path[:-1] for path in paths}
    through: dict[tuple[int, ...], list[int]] = {path: [] for path in paths}
    for sequence, leaf in enumerate(path for path in paths if path not in inner):
        for depth in range(1, len(leaf) + 1):
            through[leaf[:depth]].append(sequence)
    return tuple(tuple(through[path]) for path in paths)

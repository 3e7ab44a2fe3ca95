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
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]


class Branch(NamedTuple):
    """One of the tokens that labels go on with after a place."""

    step: int
    """A step that reads this token's probability."""
    place: int
    """The place that the token leads to; 0 where a label ends with it."""
    label: int
    """Position in ``labels`` of one that goes on so."""


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
    branches: tuple[tuple[Branch, ...], ...]
    """``(places,)`` how labels go on from each."""

    @property
    def trunk(self) -> int:
        """How many nodes all labels begin with."""
        return len(self.chain(0)) - 1

    def chain(self, place: int) -> list[int]:
        """Return a place and those that all labels through it go on with."""
        found = [place]
        while len(branches := self.branches[found[-1]]) == 1 and branches[0].place:
            found.append(branches[0].place)
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
    branches: list[dict[tuple[int, int], Branch]] = field(default_factory=lambda: [{}])
    """By place, then by token and the place that it leads to."""

    def add(self, label: int, tokens: tuple[int, ...]) -> None:
        place = 0
        for depth, token in enumerate(tokens):
            following = 0
            if depth + 1 < len(tokens):
                following = self.places.setdefault(tokens[: depth + 1], len(self.places))
            if following == len(self.branches):
                self.branches.append({})
            self.branches[place].setdefault((token, following), Branch(len(self.steps), following, label))
            self.steps.append((place, token))
            place = following


def _build(labels: Sequence[Sequence[int]], chosen: tuple[int, ...]) -> Trie:
    growth = _Growth()
    for position, label in enumerate(chosen):
        growth.add(position, tuple(labels[label]))
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
        branches=tuple(tuple(after.values()) for after in growth.branches),
    )


def _members(paths: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Give each path that no other extends a sequence, and each node all those through it."""
    inner = {path[:-1] for path in paths}
    through: dict[tuple[int, ...], list[int]] = {path: [] for path in paths}
    for sequence, leaf in enumerate(path for path in paths if path not in inner):
        for depth in range(1, len(leaf) + 1):
            through[leaf[:depth]].append(sequence)
    return tuple(tuple(through[path]) for path in paths)

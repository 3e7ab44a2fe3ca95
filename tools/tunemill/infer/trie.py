"""All labels' tokens as one tree, so that what labels share is evaluated once.

A node stands for a token that something follows; the last token of a label needs no evaluation,
only its probability at the node before. Every chain of nodes that no other extends gets a
sequence of its own in llama.cpp's memory; a shared node belongs to all sequences through it.
Node -1 is the prompt's last token, where every label begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
ROOT = -1


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
    look_up_label: npt.NDArray[np.intp]
    """``(steps,)`` position in ``labels`` whose score a step adds to."""
    look_up_node: npt.NDArray[np.intp]
    """``(steps,)`` node whose distribution the step reads, plus one: 0 is the prompt's end."""
    look_up_token: npt.NDArray[np.intp]
    """``(steps,)`` token whose log-probability the step reads."""

    def scores(self, log_probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Sum each label's steps: ``(steps,)`` log-probabilities to ``(labels,)`` in nats."""
        sums = np.bincount(self.look_up_label, weights=log_probabilities, minlength=len(self.labels))
        return sums.astype(np.float64)


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
    """Nodes while a tree grows: ``index`` maps a path of tokens to its node."""

    index: dict[tuple[int, ...], int] = field(default_factory=dict)
    steps: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, position: int, tokens: tuple[int, ...]) -> None:
        node = ROOT
        for depth, token in enumerate(tokens):
            self.steps.append((position, node + 1, token))
            if depth + 1 < len(tokens):
                node = self.index.setdefault(tokens[: depth + 1], len(self.index))


def _build(labels: Sequence[Sequence[int]], chosen: tuple[int, ...]) -> Trie:
    growth = _Growth()
    for position, label in enumerate(chosen):
        growth.add(position, tuple(labels[label]))
    paths = list(growth.index)
    members = _members(paths)
    steps = np.array(growth.steps, dtype=np.intp).reshape(-1, 3)
    return Trie(
        tokens=np.array([path[-1] for path in paths], dtype=np.int32),
        depths=np.array([len(path) - 1 for path in paths], dtype=np.int32),
        counts=np.array([len(through) for through in members], dtype=np.int32),
        members=np.array([sequence for through in members for sequence in through], dtype=np.int32),
        sequences=max((through[-1] + 1 for through in members), default=1),
        labels=chosen,
        look_up_label=steps[:, 0],
        look_up_node=steps[:, 1],
        look_up_token=steps[:, 2],
    )


def _members(paths: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Give each path that no other extends a sequence, and each node all those through it."""
    inner = {path[:-1] for path in paths}
    through: dict[tuple[int, ...], list[int]] = {path: [] for path in paths}
    for sequence, leaf in enumerate(path for path in paths if path not in inner):
        for depth in range(1, len(leaf) + 1):
            through[leaf[:depth]].append(sequence)
    return tuple(tuple(through[path]) for path in paths)

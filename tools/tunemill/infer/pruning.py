"""Which labels' tokens are computed after a prompt, and what is known of labels that are left out.

The probability of a label's beginning is an upper bound of that of all labels that begin so. So once some
labels are known, beginnings that together have at most ``max_pruned`` of the probability need not be gone
on with: no label's probability can be off by more. The answer is never uncertain: no beginning that is
likelier than the likeliest label is left out; and where the answer is the label that is written token by
token, wherever labels part on its way the likelier token is known.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tunemill.infer.trie import Trie

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Logits = npt.NDArray[np.float32]

AT_ONCE = 1 << 20  # logits that are exponentiated together, which bounds the memory for it
FEW = 8
"""Nodes up to which all are computed with the prompt: another batch would cost more."""
WRITING = math.log(0.1)
"""Nats from which a token is taken to be part of what the model is writing, so that its label is gone on
with to where labels part; after a less likely one the next token alone is computed."""


def nodes_at_once(trie: Trie, max_pruned: float) -> int:
    """Return how many nodes, the first ones, are computed with the prompt."""
    nodes = len(trie.tokens)
    return nodes if max_pruned == 0 or nodes <= FEW else trie.trunk


def log_sums(logits: Logits) -> Floats:
    """Return ``(rows,)`` what ``(rows, vocabulary)`` logits have beyond log-probabilities."""
    rows, vocabulary = logits.shape
    sums, at_once = np.empty(rows), max(1, AT_ONCE // vocabulary)
    for start in range(0, rows, at_once):
        some = logits[start : start + at_once]
        peaks = some.max(axis=1)
        shares = some - peaks[:, None]
        np.exp(shares, out=shares)
        sums[start : start + at_once] = peaks + np.log(shares.sum(axis=1, dtype=np.float64))
    return sums


class Search:
    """The scores of one prompt's labels while they become known."""

    def __init__(self, trie: Trie, max_pruned: float, greedy: bool = False) -> None:
        self.trie = trie
        self._max_pruned = max_pruned
        self._greedy = greedy
        self._starts = np.cumsum(trie.lengths) - trie.lengths
        self._nats = np.zeros(len(trie.look_up_token))
        self._known = np.zeros(len(trie.look_up_token), bool)
        self.wanted = list(range(nodes_at_once(trie, max_pruned) + 1))
        """Places whose logits come next, parents before children; none once all is known."""

    def take(self, logits: Logits, normalisers: Floats) -> None:
        """Take ``(wanted, vocabulary)`` logits, and find out what is wanted after them.

        ``normalisers``: ``(wanted,)``, see ``log_sums``.
        """
        rows = np.full(len(self.trie.branches), -1)
        rows[self.wanted] = np.arange(len(self.wanted))
        row = rows[self.trie.look_up_place]
        steps = np.flatnonzero(row >= 0)
        row = row[steps]
        self._nats[steps] = logits[row, self.trie.look_up_token[steps]] - normalisers[row]
        self._known[steps] = True
        self.wanted = self._next()

    def scores(self) -> tuple[Floats, Flags]:
        """Return ``(labels,)`` log-likelihoods in nats, and which of them are not known.

        Those are as if the probability of what labels begin with were the same for each of these.
        """
        known, bounds = self._counts(), self._bounds()
        left_out = known < self.trie.lengths
        if left_out.any():
            _, of, count = np.unique(
                self._places_after(known)[left_out], return_inverse=True, return_counts=True
            )
            bounds[left_out] -= np.log(count[of])
        return bounds, left_out

    def written(self) -> int:
        """Return the label, its position in the trie's, that is written if each token is the likeliest."""
        label, missing = self._write()
        if missing:
            raise ValueError("what is wanted has not been taken yet")
        return label

    def _write(self) -> tuple[int, list[int]]:
        """Return the label written, or one that may be, and the places whose logits are missing for it."""
        place, missing = 0, list[int]()
        while True:
            branches = self.trie.branches[place]
            if not self._known[branches[0].step]:
                missing.append(place)
                if len(branches) > 1:
                    return branches[0].label, missing
            best = max(branches, key=lambda branch: self._nats[branch.step])
            if not best.place:
                return best.label, []
            place = best.place

    def _next(self) -> list[int]:
        if self._greedy and self._max_pruned == 1:
            return self._write()[1]
        known = self._counts()
        left_out = known < self.trie.lengths
        if not left_out.any():
            return []
        bounds = self._bounds()
        stems, first = np.unique(self._places_after(known)[left_out], return_index=True)
        nats = bounds[left_out][first]
        highest = bounds.max()
        shares = np.exp(nats - highest)
        total = shares.sum() + np.exp(bounds[~left_out] - highest).sum()
        ascending = np.argsort(nats, kind="stable")
        going_on = ascending[np.cumsum(shares[ascending]) > self._max_pruned * total]
        if self._max_pruned == 1:
            going_on = ascending[:0]
        if not len(going_on) and not self._greedy:
            going_on = np.flatnonzero(nats > bounds[~left_out].max(initial=-np.inf))
        last = self._nats[(self._starts + known - 1)[left_out][first]]
        wanted = set[int](self._write()[1] if self._greedy else ())
        for stem in going_on.tolist():
            place = int(stems[stem])
            wanted.update(self.trie.chain(place) if last[stem] >= WRITING else [place])
        return sorted(wanted)

    def _counts(self) -> npt.NDArray[np.intp]:
        """``(labels,)`` steps that are known."""
        return np.asarray(np.add.reduceat(self._known, self._starts, dtype=np.intp))

    def _bounds(self) -> Floats:
        """``(labels,)`` nats of what is known of each label."""
        return np.asarray(np.add.reduceat(self._nats, self._starts))

    def _places_after(self, known: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """``(labels,)`` the place that each label's next step reads; of no meaning for one that is known."""
        steps = np.minimum(self._starts + known, len(self._nats) - 1)
        return np.asarray(self.trie.look_up_place[steps])

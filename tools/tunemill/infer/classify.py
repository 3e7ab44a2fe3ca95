"""Scoring every label of a task by its exact log-likelihood given each prompt.

A label's score is the sum over its completion's tokens (label text and end of turn, tokenized
apart from the prompt as in training) of log p(token | everything before). Softmax over the
labels' scores gives probabilities that sum to 1 over the task's set, not over all texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tunemill.infer.engine import MOST_SEQUENCES, Batch, Engine, Logits, join, run_of
from tunemill.infer.pool import Pool
from tunemill.infer.sequences import Sequences
from tunemill.infer.trie import Trie

LOGITS_BYTES = 128 << 20  # of one batch's logits; Llama 3's vocabulary fits 256 nodes in it

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Question:
    """One prompt and the labels to score after it."""

    prompt: tuple[int, ...]
    """Token ids, the common beginning included."""
    tries: tuple[Trie, ...]
    """All labels, in one tree unless there are more than llama.cpp has sequences."""
    sequences: Sequences | None = None
    """What an answer may be, where it may have several labels."""


@dataclass(frozen=True)
class _Item:
    question: int
    prompt: tuple[int, ...]
    trie: Trie
    last: bool
    """No other tree of this question follows."""

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.trie.tokens)

    @property
    def rows(self) -> int:
        """Logits wanted: after the prompt and after each node."""
        return len(self.trie.tokens) + 1


def score(pool: Pool, questions: Sequence[Question], labels: int) -> Iterator[tuple[int, Floats]]:
    """Yield each question's number and its ``(labels,)`` log-likelihoods in nats, in order.

    Questions are packed in the order given into batches of at most ``pool.batch_tokens`` tokens
    beyond the common beginning, so which share a batch depends on nothing else.
    """
    scores = np.full(labels, np.nan)
    packs = list(_packs(pool, list(_items(questions))))
    for items, found in zip(packs, pool.each(_answer, packs), strict=True):
        for item, part in zip(items, found, strict=True):
            scores[list(item.trie.labels)] = part
            if item.last:
                yield item.question, scores
                scores = np.full(labels, np.nan)


def cells(question: Question) -> int:
    """Return how many tokens llama.cpp has to remember to answer a question."""
    return len(question.prompt) + max(len(trie.tokens) for trie in question.tries)


def probabilities(scores: Floats) -> Floats:
    """Softmax over the labels: ``(labels,)`` nats to ``(labels,)`` shares that sum to 1."""
    shares = np.exp(scores - scores.max())
    return np.asarray(shares / shares.sum())


def _items(questions: Sequence[Question]) -> Iterator[_Item]:
    for number, question in enumerate(questions):
        for part, trie in enumerate(question.tries):
            yield _Item(number, question.prompt, trie, part + 1 == len(question.tries))


def _answer(engine: Engine, pack: Sequence[_Item]) -> list[Floats]:
    logits = engine.decode(_batch(engine, pack))
    scores = []
    row = 0
    for item in pack:
        scores.append(_read(logits[row : row + item.rows], item.trie))
        row += item.rows
    engine.forget()
    return scores


def _packs(pool: Pool, items: Sequence[_Item]) -> Iterator[list[_Item]]:
    most_rows = LOGITS_BYTES // (4 * pool.vocabulary)
    pack: list[_Item] = []
    tokens = sequences = rows = 0
    for item in items:
        tokens += item.tokens - pool.shared
        sequences += item.trie.sequences
        rows += item.rows
        if pack and (tokens > pool.batch_tokens or sequences > MOST_SEQUENCES or rows > most_rows):
            yield pack
            pack = []
            tokens, sequences, rows = item.tokens - pool.shared, item.trie.sequences, item.rows
        pack.append(item)
    if pack:
        yield pack


def _batch(engine: Engine, pack: Sequence[_Item]) -> Batch:
    parts = []
    first = 0
    for item in pack:
        members = range(first, first + item.trie.sequences)
        parts.append(run_of(item.prompt[engine.shared :], engine.shared, members, output_last=True))
        parts.append(_nodes(item.trie, len(item.prompt), first))
        first += item.trie.sequences
    return join(parts)


def _nodes(trie: Trie, start: int, first: int) -> Batch:
    return Batch(
        trie.tokens,
        trie.depths + np.int32(start),
        trie.counts,
        trie.members + np.int32(first),
        np.ones(len(trie.tokens), np.int8),
    )


def _read(logits: Logits, trie: Trie) -> Floats:
    """Turn ``(nodes + 1, vocabulary)`` logits into the labels' scores."""
    peaks = logits.max(axis=1)
    normalisers = peaks + np.log(np.exp(logits - peaks[:, None]).sum(axis=1, dtype=np.float64))
    steps = logits[trie.look_up_node, trie.look_up_token] - normalisers[trie.look_up_node]
    return trie.scores(steps)

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

from tunemill.infer.engine import Batch, Engine, Logits, alike, join, run_of
from tunemill.infer.packs import WORTH_MOVING, Bounds, Item, Pack, most_cells, packs
from tunemill.infer.pool import Pool
from tunemill.infer.sequences import Sequences
from tunemill.infer.trie import Trie

LOGITS_BYTES = 128 << 20  # of one pack's logits; Llama 3's vocabulary fits 256 nodes in it

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


def score(pool: Pool, questions: Sequence[Question], labels: int) -> Iterator[tuple[int, Floats]]:
    """Yield each question's number and its ``(labels,)`` log-likelihoods in nats, in any order.

    Which questions are computed together depends on them and the common beginning alone.
    """
    items = [Item(number, each.prompt, trie) for number, each in enumerate(questions) for trie in each.tries]
    open_tries = [len(question.tries) for question in questions]
    scores = np.full((len(questions), labels), np.nan)
    bounds = Bounds(LOGITS_BYTES // (4 * pool.vocabulary), pool.shared)
    for found in pool.each(_answer, list(_chains(packs(items, bounds), pool.shared))):
        for item, part in found:
            scores[item.question, list(item.trie.labels)] = part
            open_tries[item.question] -= 1
            if not open_tries[item.question]:
                yield item.question, scores[item.question]


def cells(questions: Sequence[Question]) -> int:
    """Return how many tokens llama.cpp has to remember to answer questions."""
    largest = max(len(each.prompt) + len(trie.tokens) for each in questions for trie in each.tries)
    return max(largest, most_cells(max(len(each.prompt) for each in questions)))


def probabilities(scores: Floats) -> Floats:
    """Softmax over the labels: ``(labels,)`` nats to ``(labels,)`` shares that sum to 1."""
    shares = np.exp(scores - scores.max())
    return np.asarray(shares / shares.sum())


def _chains(found: Iterator[Pack], beginning: int) -> Iterator[list[Pack]]:
    """Put packs together that go on from one another's beginning, so that one engine computes them."""
    chain: list[Pack] = []
    for pack in found:
        if chain and alike(chain[-1].prefix, pack.prefix) - beginning <= WORTH_MOVING:
            yield chain
            chain = []
        chain.append(pack)
    if chain:
        yield chain


def _answer(engine: Engine, chain: Sequence[Pack]) -> list[tuple[Item, Floats]]:
    return [answer for pack in chain for answer in _scores(engine, pack)]


def _scores(engine: Engine, pack: Pack) -> Iterator[tuple[Item, Floats]]:
    engine.share(pack.prefix)
    batches = _batches(pack)
    at_once = engine.texts or len(batches)
    for start in range(0, len(batches), at_once):
        logits = engine.decode(join(batches[start : start + at_once]))
        row = 0
        for item in pack.items[start : start + at_once]:
            yield item, _read(logits[row : row + item.nodes + 1], item.trie)
            row += item.nodes + 1
    engine.forget()


def _batches(pack: Pack) -> list[Batch]:
    """Return for each item what of its prompt is new, and its labels."""
    firsts = np.cumsum([0, *(item.trie.sequences for item in pack.items)]).tolist()
    batches = []
    for place, (item, stretches) in enumerate(zip(pack.items, pack.stretches(), strict=True)):
        parts = [
            run_of(
                item.prompt[each.start : each.stop],
                each.start,
                range(firsts[each.first], firsts[each.last + 1]),
                output_last=each.stop == len(item.prompt),
            )
            for each in stretches
        ]
        batches.append(join([*parts, _nodes(item.trie, len(item.prompt), firsts[place])]))
    return batches


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
    shares = logits - peaks[:, None]
    np.exp(shares, out=shares)
    normalisers = peaks + np.log(shares.sum(axis=1, dtype=np.float64))
    steps = logits[trie.look_up_node, trie.look_up_token] - normalisers[trie.look_up_node]
    return trie.scores(steps)

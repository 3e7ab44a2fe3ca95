"""Scoring every label of a task by its exact log-likelihood given each prompt.

A label's score is the sum over its completion's tokens (label text and end of turn, tokenized
apart from the prompt as in training) of log p(token | everything before). Softmax over the
labels' scores gives probabilities that sum to 1 over the task's set, not over all texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tunemill.errors import ConfigurationError
from tunemill.infer.engine import MOST_SEQUENCES, Batch, Engine, alike, join, run_of
from tunemill.infer.packs import LATER, WORTH_MOVING, Bounds, Item, Pack, most_cells, packs
from tunemill.infer.pool import Pool
from tunemill.infer.pruning import Flags, Floats, Search, log_sums, nodes_at_once
from tunemill.infer.sequences import Sequences
from tunemill.infer.trie import Trie

LOGITS_BYTES = 128 << 20  # of one pack's logits; Llama 3's vocabulary fits 256 nodes in it


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
class Scored:
    """What is known of one question's labels."""

    nats: Floats
    """``(labels,)`` log-likelihoods."""
    left_out: Flags
    """``(labels,)`` those whose log-likelihood is not known, but what they have together."""
    written: int | None
    """The label that is written if each token is the likeliest; None unless that was asked for."""


def score(
    pool: Pool, questions: Sequence[Question], labels: int, max_pruned: float, greedy: bool = False
) -> Iterator[tuple[int, Scored]]:
    """Yield each question's number and scores; those left out have ``max_pruned`` together at most.

    Questions come in any order; which are computed together depends on them and the common beginning alone.

    Raises:
        ConfigurationError: ``greedy``, and there are more labels than one tree holds.
    """
    if greedy and any(len(question.tries) > 1 for question in questions):
        raise ConfigurationError(
            f"decoding=greedy is for labels of up to {MOST_SEQUENCES} beginnings: leave it out"
        )
    items = [
        Item(number, each.prompt, trie, nodes_at_once(trie, max_pruned))
        for number, each in enumerate(questions)
        for trie in each.tries
    ]
    open_tries = [len(question.tries) for question in questions]
    scores = np.full((len(questions), labels), np.nan)
    left_out = np.zeros((len(questions), labels), bool)
    bounds = Bounds(LOGITS_BYTES // (4 * pool.vocabulary), pool.shared)
    chains = list(_chains(packs(items, bounds), pool.shared))
    for found in pool.each(lambda engine, chain: _answer(engine, chain, max_pruned, greedy), chains):
        for item, search in found:
            number, where = item.question, list(item.trie.labels)
            scores[number, where], left_out[number, where] = search.scores()
            open_tries[number] -= 1
            if not open_tries[number]:
                written = item.trie.labels[search.written()] if greedy else None
                yield number, Scored(scores[number], left_out[number], written)


def cells(questions: Sequence[Question], max_pruned: float) -> int:
    """Return how many tokens llama.cpp has to remember to answer questions."""
    largest = max(len(each.prompt) + len(trie.tokens) for each in questions for trie in each.tries)
    later = LATER if max_pruned else 0
    return max(largest, most_cells(max(len(each.prompt) for each in questions)) + later)


def scores_after(engine: Engine, prompt: tuple[int, ...], tries: Sequence[Trie], labels: int) -> Floats:
    """Return the ``(labels,)`` log-likelihoods in nats of all that tries hold after one prompt.

    The prompt stays in memory, so the next tries after it cost their own tokens alone.
    """
    scores = np.full(labels, np.nan)
    for trie in tries:
        pack = Pack((Item(0, prompt, trie, len(trie.tokens)),), prompt[:-1])
        scores[list(trie.labels)] = _searches(engine, pack, 0)[0][1].scores()[0]
    return scores


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


def _answer(
    engine: Engine, chain: Sequence[Pack], max_pruned: float, greedy: bool
) -> list[tuple[Item, Search]]:
    return [found for pack in chain for found in _searches(engine, pack, max_pruned, greedy)]


def _searches(
    engine: Engine, pack: Pack, max_pruned: float, greedy: bool = False
) -> list[tuple[Item, Search]]:
    engine.share(pack.prefix)
    searches = [Search(item.trie, max_pruned, greedy) for item in pack.items]
    firsts = np.cumsum([0, *(item.trie.sequences for item in pack.items)]).tolist()
    prompts: list[Batch | None] = [*_prompts(pack, firsts)]
    while asking := [place for place, search in enumerate(searches) if search.wanted]:
        at_once = engine.texts or len(asking)
        for start in range(0, len(asking), at_once):
            together = asking[start : start + at_once]
            parts = []
            for place in together:
                if prompt := prompts[place]:
                    parts.append(prompt)
                parts.append(_nodes(searches[place], len(pack.items[place].prompt), firsts[place]))
                prompts[place] = None
            logits = engine.decode(join(parts))
            normalisers, row = log_sums(logits), 0
            for place in together:
                end = row + len(searches[place].wanted)
                searches[place].take(logits[row:end], normalisers[row:end])
                row = end
    engine.forget()
    return list(zip(pack.items, searches, strict=True))


def _prompts(pack: Pack, firsts: Sequence[int]) -> Iterator[Batch]:
    """Yield for each item what of its prompt is new; its sequences begin with its entry of ``firsts``."""
    for item, stretches in zip(pack.items, pack.stretches(), strict=True):
        yield join(
            run_of(
                item.prompt[each.start : each.stop],
                each.start,
                range(firsts[each.first], firsts[each.last + 1]),
                output_last=each.stop == len(item.prompt),
            )
            for each in stretches
        )


def _nodes(search: Search, start: int, first: int) -> Batch:
    """Return what a search wants, short of the prompt's end; ``first`` is its first sequence."""
    trie = search.trie
    nodes = [place - 1 for place in search.wanted if place]
    return Batch(
        trie.tokens[nodes],
        trie.depths[nodes] + np.int32(start),
        trie.counts[nodes],
        np.concatenate([np.empty(0, np.int32), *map(trie.members_of, nodes)]) + np.int32(first),
        np.ones(len(nodes), np.int8),
    )

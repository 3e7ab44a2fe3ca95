"""Labels left uncomputed: the answer stays the likeliest, and no probability is off by more than is said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from tunemill.errors import ConfigurationError
from tunemill.evaluate.predictions import read_predictions
from tunemill.infer.config import InferConfig
from tunemill.infer.predict import predict
from tunemill.infer.pruning import FEW, Search, log_sums
from tunemill.infer.trie import Trie, build_tries

VOCABULARY = 30
END = 2
ROUNDING = 1e-9


def some_labels(random: np.random.Generator) -> list[list[int]]:
    """Make labels of up to nine tokens, many of which begin alike."""
    found = {
        tuple(random.choice([3, 4, 5, 9], random.integers(1, 9)).tolist())
        for _ in range(random.integers(2, 40))
    }
    return [[*label, END] for label in sorted(found)]


def searched(trie: Trie, logits: Any, max_pruned: float) -> tuple[Any, Any, list[int]]:
    """Return scores, what is not known of them, and the places whose logits were asked for."""
    search, asked = Search(trie, max_pruned), list[int]()
    while search.wanted:
        asked += search.wanted
        some = logits[search.wanted]
        search.take(some, log_sums(some))
    return *search.scores(), asked


def shares_of(nats: Any) -> Any:
    odds = np.exp(nats - nats.max())
    return odds / odds.sum()


@pytest.mark.parametrize("spread", [0.3, 3.0, 9.0], ids=["unsure", "between", "sure"])
@pytest.mark.parametrize("max_pruned", [0.0, 0.001, 0.05, 0.6, 0.99])
def test_no_probability_is_off_by_more_than_was_left_out(spread: float, max_pruned: float) -> None:
    random = np.random.default_rng(5)
    saved = 0
    for _ in range(40):
        labels = some_labels(random)
        trie = build_tries(labels, 255)[0]
        logits = random.normal(0, spread, (len(trie.tokens) + 1, VOCABULARY)).astype(np.float32)
        log_shares = logits - log_sums(logits)[:, None]
        places = {(): 0} | {path: place for place, path in enumerate(paths(trie), 1)}
        exact = shares_of(
            np.array(
                [sum(log_shares[places[tuple(ids[:n])], ids[n]] for n in range(len(ids))) for ids in labels]
            )
        )
        nats, left_out, asked = searched(trie, logits, max_pruned)
        found = shares_of(nats)
        pruned = found[left_out].sum()
        assert pruned <= max_pruned + ROUNDING
        assert np.abs(found - exact).max() <= pruned + ROUNDING
        assert found.argmax() == exact.argmax()
        assert not left_out[found.argmax()]
        assert len(set(asked)) == len(asked)
        saved += len(trie.tokens) + 1 - len(asked)
    assert saved > 0 if max_pruned else saved == 0


@pytest.mark.parametrize("max_pruned", [0.0, 0.05, 1.0])
def test_the_label_written_token_by_token_is_found(max_pruned: float) -> None:
    random = np.random.default_rng(6)
    asked, likeliest = 0, 0
    for _ in range(60):
        labels = some_labels(random)
        trie = build_tries(labels, 255)[0]
        logits = random.normal(0, 3, (len(trie.tokens) + 1, VOCABULARY)).astype(np.float32)
        places = {(): 0} | {path: place for place, path in enumerate(paths(trie), 1)}
        left, written = labels, list[int]()
        while [written] != left:
            tokens = {label[len(written)] for label in left}
            written.append(max(tokens, key=lambda token: logits[places[tuple(written)], token]))
            left = [label for label in left if label[: len(written)] == written]
        search = Search(trie, max_pruned, greedy=True)
        while search.wanted:
            asked += len(search.wanted)
            search.take(logits[search.wanted], log_sums(logits[search.wanted]))
        nats, left_out = search.scores()
        assert labels[search.written()] == written
        assert shares_of(nats)[left_out].sum() <= max_pruned + ROUNDING
        likeliest += int(nats.argmax()) == search.written()
        asked -= len(trie.tokens) + 1
    assert asked < 0 if max_pruned else asked == 0
    assert likeliest < 60 or max_pruned  # they are not the same thing


def paths(trie: Trie) -> list[tuple[int, ...]]:
    """Return each node's tokens from the first on, read off the labels that go through it."""
    found: dict[int, tuple[int, ...]] = {0: ()}
    for place, token, following in zip(
        trie.look_up_place, trie.look_up_token, [*trie.look_up_place[1:], 0], strict=True
    ):
        if following:
            found[int(following)] = (*found[int(place)], int(token))
    return [found[place] for place in range(1, len(trie.tokens) + 1)]


def test_a_sure_model_needs_few_of_the_labels() -> None:
    labels = [[7, first, *range(10, 20), END] for first in range(20, 28)]
    trie = build_tries(labels, 255)[0]
    logits = np.zeros((len(trie.tokens) + 1, VOCABULARY), np.float32)
    for place, token in zip(trie.look_up_place, trie.look_up_token, strict=True):
        logits[place, token] = 12.0 if token != 20 else 20.0
    _, left_out, asked = searched(trie, logits, 0.01)
    assert left_out.tolist() == [False] + [True] * 7
    assert len(asked) == 1 + 1 + 11  # the prompt's end, what all begin with, and one label to its end


def test_what_labels_begin_with_and_a_few_tokens_come_with_the_prompt() -> None:
    begins_alike = build_tries([[7, 8, *range(first, first + 9), END] for first in (10, 20)], 255)[0]
    assert Search(begins_alike, 0.01).wanted == [0, 1, 2]
    short = build_tries([[first, END] for first in range(3, 3 + FEW)], 255)[0]
    assert Search(short, 0.01).wanted == list(range(FEW + 1))
    assert Search(begins_alike, 0).wanted == list(range(len(begins_alike.tokens) + 1))


LONG = ("networking and servers", "networking and sockets", "data", "data types", "files and folders", "it")


@pytest.mark.parametrize("max_pruned", [0.001, 0.3])
def test_rows_say_how_much_was_left_out(
    micro: Any, dataset: Any, make_work: Any, labelled: Any, max_pruned: float
) -> None:
    data = dataset([(text, LONG[n % len(LONG)]) for n, (text, _) in enumerate(labelled(40))], LONG)
    exactly, roughly = (
        make_work(micro.gguf.parent, data, f"out-{allowed}", max_pruned=allowed)
        for allowed in (0, max_pruned)
    )
    facts = [predict(work) for work in (exactly, roughly)]
    exact, found = (
        pyarrow.parquet.read_table(work.output / "predictions.parquet").to_pylist()
        for work in (exactly, roughly)
    )
    assert facts[0]["most_pruned"] == 0
    assert 0 < facts[1]["most_pruned"] == max(row["pruned"] for row in found) <= max_pruned
    assert read_predictions(roughly.output).most_pruned == facts[1]["most_pruned"]
    for one, other in zip(exact, found, strict=True):
        assert one["label"] == other["label"]
        off = np.abs(np.array(one["probabilities"]) - np.array(other["probabilities"]))
        assert off.max() <= other["pruned"] + 0.001


@pytest.mark.parametrize("setting", [{"max_pruned": 0.01}, {"decoding": "greedy"}])
def test_calibration_excludes_what_does_not_know_all_labels(setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="leave one of them out"):
        InferConfig(calibration="contextual", **setting)


def test_greedy_labels_fit_one_tree(model_of_many: Any) -> None:
    work = model_of_many(decoding="greedy", max_pruned=1)
    with pytest.raises(ConfigurationError, match="decoding=greedy is for labels of up to 255 beginnings"):
        predict(work)


@pytest.fixture
def model_of_many(micro: Any, dataset: Any, make_work: Any, labelled: Any) -> Any:
    """An inference over more labels than llama.cpp has sequences."""
    labels = [f"{a}{b} in" for a in "abcdefghijklmnopq" for b in "abcdefghijklmnopq"]
    data = dataset([(text, labels[0]) for text, _ in labelled(2)], labels)
    return lambda **settings: make_work(micro.gguf.parent, data, **settings)

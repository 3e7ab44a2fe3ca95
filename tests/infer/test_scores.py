"""Label scores against transformers on the same weights."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tunemill.infer.classify import Question, Scored, probabilities, score
from tunemill.infer.engine import Size
from tunemill.infer.model import Model
from tunemill.infer.pool import Pool
from tunemill.infer.run import common_beginning
from tunemill.infer.trie import build_tries

NATS = 0.02
"""Largest difference allowed in one label's log-likelihood. llama.cpp rounds activations and the
remembered keys and values to float16 where transformers computes in float32."""

LABELS = ["networking</s>", "net services</s>", "data</s>", "data types</s>", "a</s>", "a</s></s>"]


@pytest.fixture(scope="module")
def model(micro: Any) -> Iterator[Model]:
    with Model(micro.gguf) as opened:
        yield opened


def scored(
    model: Model, prompts: list[str], labels: list[str], most: int = 256, max_pruned: float = 0, **size: Any
) -> list[Scored]:
    tries = build_tries([model.tokens(label) for label in labels], most)
    questions = [Question(model.tokens(prompt), tries) for prompt in prompts]
    shape = Size(0, size.get("n_batch", 0), size.get("flash", False), size.get("texts", 0))
    with Pool(model, shape, size.get("threads", 1), threading.Event()) as pool:
        beginning = common_beginning([question.prompt for question in questions])
        pool.share(beginning[: size.get("shared", 1024)], 2048)
        found = dict(score(pool, questions, len(labels), max_pruned, size.get("greedy", False)))
        return [found[number] for number in range(len(questions))]


def scores_of(model: Model, prompts: list[str], labels: list[str], **settings: Any) -> Any:
    return np.array([one.nats for one in scored(model, prompts, labels, **settings)])


def expected(reference: Any, model: Model, prompts: list[str], labels: list[str]) -> Any:
    import torch

    rows = []
    for prompt in prompts:
        begin = list(model.tokens(prompt))
        row = []
        for label in labels:
            end = list(model.tokens(label))
            with torch.no_grad():
                logits = reference(torch.tensor([begin + end])).logits[0].double().log_softmax(-1)
            row.append(sum(float(logits[len(begin) - 1 + n, token]) for n, token in enumerate(end)))
        rows.append(row)
    return np.array(rows)


PROMPTS = [f"<s>[which part: {text}]" for text in ("sort a list", "open the net and send", "it " * 150, "x")]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="plain"),
        pytest.param({"shared": 0}, id="nothing-shared"),
        pytest.param({"n_batch": 64}, id="prompt-longer-than-batch"),
        pytest.param({"most": 2}, id="more-labels-than-sequences"),
        pytest.param({"threads": 2}, id="two-contexts"),
        pytest.param({"flash": True}, id="flash-attention"),
    ],
)
def test_scores_are_those_of_transformers(reference: Any, model: Model, settings: dict[str, Any]) -> None:
    found = scores_of(model, PROMPTS, LABELS, **settings)
    wanted = expected(reference, model, PROMPTS, LABELS)
    assert np.abs(found - wanted).max() < NATS
    assert wanted.std(axis=0).min() > 10 * NATS  # else prompts would be interchangeable


def test_a_prompts_scores_do_not_depend_on_its_neighbours(model: Model) -> None:
    alone = [scores_of(model, [prompt], LABELS)[0] for prompt in PROMPTS]
    together = scores_of(model, PROMPTS, LABELS)
    assert np.abs(np.array(alone) - together).max() < NATS


def test_threads_and_contexts_change_no_bit(model: Model) -> None:
    prompts = [f"<s>[{'it ' * (n % 7)}{n}]" for n in range(40)]
    assert (
        scores_of(model, prompts, LABELS, threads=1) == scores_of(model, prompts, LABELS, threads=3)
    ).all()


def test_many_labels_share_what_they_begin_with(model: Model) -> None:
    labels = [f"data {first}{second}</s>" for first in "abcdefghij" for second in "klmnopqrst"]
    found = scores_of(model, PROMPTS[:2], labels)
    one_by_one = [scores_of(model, PROMPTS[:2], [label])[:, 0] for label in labels[::9]]
    assert np.abs(found[:, ::9] - np.array(one_by_one).T).max() < NATS


def test_labels_may_be_left_out_of_several_trees(model: Model) -> None:
    labels = [f"data {first}{second} data</s>" for first in "abcdef" for second in "klmnop"]
    exact = scores_of(model, PROMPTS, labels)
    found = scores_of(model, PROMPTS, labels, most=9, max_pruned=0.3)
    off = np.abs(np.array([probabilities(row) for row in found]) - [probabilities(row) for row in exact])
    assert 0.001 < off.max() <= 0.3  # what was left out shows, within the bound
    assert (found.argmax(axis=1) == exact.argmax(axis=1)).all()


@pytest.mark.parametrize("max_pruned", [0, 0.1, 1])
def test_greedy_labels_are_those_that_transformers_writes(
    reference: Any, model: Model, max_pruned: float
) -> None:
    import torch

    labels = ["read files</s>", "read it</s>", "data</s>", "data types</s>", "server</s>", "services</s>"]
    labels += [f"the {end}</s>" for end in ("net", "news", "other", "end", "old")]
    ids = [list(model.tokens(label)) for label in labels]
    prompts = [f"<s>[which part: {text} {n}]" for n in range(6) for text in ("sort", "open the net", "x")]
    found = scored(model, prompts, labels, max_pruned=max_pruned, greedy=True)
    compared = set()
    for prompt, one in zip(prompts, found, strict=True):
        text, left, closest = list(model.tokens(prompt)), list(range(len(labels))), math.inf
        depth = 0
        while len(left) > 1:
            with torch.no_grad():
                logits = reference(torch.tensor([text])).logits[0, -1]
            best, *others = sorted({ids[label][depth] for label in left}, key=lambda token: -logits[token])
            closest = min([closest, *(float(logits[best] - logits[other]) for other in others)])
            left = [label for label in left if ids[label][depth] == best]
            text.append(best)
            depth += 1
        if closest > 2 * NATS:
            assert one.written == left[0]
            compared.add(left[0])
    assert len(compared) > 2


def test_probabilities_sum_to_one_and_keep_the_order() -> None:
    shares = probabilities(np.array([-1000.0, -1001.0, -1200.0]))
    assert math.isclose(shares.sum(), 1)
    assert all(above > below for above, below in pairwise(shares))
    assert math.isclose(shares[0] / shares[1], math.e)

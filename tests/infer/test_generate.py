"""Free answers against transformers, alone and in company."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from tunemill.infer.engine import Size
from tunemill.infer.generate import Continuation, Prompt, Sampling, cells, generate
from tunemill.infer.model import Model
from tunemill.infer.pool import Pool
from tunemill.infer.predict import predict
from tunemill.infer.run import common_beginning

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def model(micro: Any) -> Iterator[Model]:
    with Model(micro.gguf) as opened:
        yield opened


def answers(model: Model, texts: list[str], sampling: Sampling, threads: int = 1) -> list[Continuation]:
    prompts = [Prompt(number, model.tokens(text)) for number, text in enumerate(texts)]
    with Pool(model, Size(0, 512, False), threads, threading.Event()) as pool:
        pool.share(common_beginning([prompt.tokens for prompt in prompts]), cells(prompts, sampling))
        return list(generate(pool, model, prompts, sampling))


TEXTS = [f"<s>[which part: {'read ' * (n % 5)}{n}]" for n in range(90)]
GREEDY = Sampling(16, 0.0, 1)


def test_greedy_answers_are_those_of_transformers(reference: Any, model: Model) -> None:
    import torch

    found = answers(model, TEXTS[:6], GREEDY)
    for text, answer in zip(TEXTS[:6], found, strict=True):
        ids = list(model.tokens(text))
        for _ in range(16):
            with torch.no_grad():
                token = int(reference(torch.tensor([ids])).logits[0, -1].argmax())
            if token == 2:
                break
            ids.append(token)
        assert answer.text == model.text(ids[len(model.tokens(text)) :]).strip()


def test_same_seed_same_answers_whatever_the_threads(model: Model) -> None:
    warm = Sampling(16, 1.0, 7)
    first = answers(model, TEXTS, warm, threads=1)
    assert answers(model, TEXTS, warm, threads=3) == first
    assert answers(model, TEXTS, Sampling(16, 1.0, 8)) != first
    assert len({answer.text for answer in first}) > 80


def test_an_answer_ends_with_the_turn_or_at_the_limit(model: Model) -> None:
    found = answers(model, TEXTS, Sampling(200, 2.0, 3))
    ended = [answer for answer in found if answer.ended]
    assert 0 < len(ended) < len(found)  # 433 tokens, one of them EOS: some end by chance within 200
    assert all("</s>" not in answer.text for answer in found)


def test_the_stage_writes_free_answers(
    micro: Any, dataset: Make, make_work: Make, labelled: Make, tmp_path: Path
) -> None:
    rows = [*labelled(20), ("", "nothing")]
    work = make_work(micro.gguf.parent, dataset(rows, (), "text"), max_new_tokens=5)
    facts = predict(work)
    table = pyarrow.parquet.read_table(work.output / "predictions.parquet").to_pylist()
    assert all(row["label"] and row["ended"] is not None for row in table[:20])
    assert (table[20]["label"], table[20]["error"], table[20]["ended"]) == (None, "empty text", None)
    assert facts["cut_off"] == sum(row["ended"] is False for row in table)
    assert all(row["probability"] is None for row in table)


def test_room_for_the_answer_is_kept(micro: Any, dataset: Make, make_work: Make) -> None:
    data = dataset([("x" * 900, ""), ("y", "")], (), "text")
    work = make_work(micro.gguf.parent, data, max_new_tokens=200)
    predict(work)
    long, short = pyarrow.parquet.read_table(work.output / "predictions.parquet").to_pylist()
    assert long["error"].endswith("tokens of prompt and 200 of answer, at most 1024")
    assert short["error"] is None

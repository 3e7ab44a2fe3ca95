"""Free answers against transformers and llama-cpp-python, alone and in company."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from tunemill.errors import ConfigurationError, Stopped
from tunemill.infer.engine import Size
from tunemill.infer.generate import Continuation, Prompt, Sampling, cells, draw, generate
from tunemill.infer.model import Model
from tunemill.infer.pool import Pool
from tunemill.infer.predict import predict
from tunemill.infer.run import common_beginning

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def model(micro: Any) -> Iterator[Model]:
    with Model(micro.gguf) as opened:
        yield opened


def samples(
    model: Model, texts: list[str], sampling: Sampling, threads: int = 1
) -> list[tuple[Continuation, ...]]:
    prompts = [Prompt(number, model.tokens(text)) for number, text in enumerate(texts)]
    with Pool(model, Size(0, 512, False), threads, threading.Event()) as pool:
        pool.share(common_beginning([prompt.tokens for prompt in prompts]), cells(prompts, sampling))
        return list(generate(pool, model, prompts, sampling))


def answers(model: Model, texts: list[str], sampling: Sampling, threads: int = 1) -> list[Continuation]:
    return [found[0] for found in samples(model, texts, sampling, threads)]


TEXTS = [f"<s>[which part: {'read ' * (n % 5)}{n}]" for n in range(90)]
GREEDY = Sampling(16, 0.0, 1)


def test_greedy_answers_and_their_likelihoods_are_those_of_transformers(reference: Any, model: Model) -> None:
    import torch

    for text, answer in zip(TEXTS[:6], answers(model, TEXTS[:6], GREEDY), strict=True):
        ids, logprob = list(model.tokens(text)), 0.0
        for _ in range(16):
            with torch.no_grad():
                steps = reference(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            token = int(steps.argmax())
            logprob += float(steps[token])
            if token == 2:
                break
            ids.append(token)
        assert answer.text == model.text(ids[len(model.tokens(text)) :])
        assert answer.logprob == pytest.approx(logprob, abs=5e-3)


def test_same_seed_same_answers_whatever_the_threads(model: Model) -> None:
    warm = Sampling(16, 1.0, 7)
    first = answers(model, TEXTS, warm, threads=1)
    assert answers(model, TEXTS, warm, threads=3) == first
    assert answers(model, TEXTS, Sampling(16, 1.0, 8)) != first
    assert len({answer.text for answer in first}) > 80


def test_the_first_of_several_samples_is_the_only_one_of_one(model: Model) -> None:
    """So that asking for more later keeps the answers there are, but for last bits of likelihoods."""
    several = samples(model, TEXTS[:20], Sampling(8, 1.0, 7, samples=5))
    alone = answers(model, TEXTS[:20], Sampling(8, 1.0, 7))
    assert [found[0].text for found in several] == [answer.text for answer in alone]
    assert all(len({sample.text for sample in found}) == 5 for found in several)
    for found, answer in zip(several, alone, strict=True):
        assert found[0].logprob == pytest.approx(answer.logprob, abs=5e-3)


def test_more_samples_than_places_are_made_all_the_same(model: Model) -> None:
    found = samples(model, TEXTS[:3], Sampling(4, 1.0, 7, samples=20))
    assert [len(of_one) for of_one in found] == [20, 20, 20]
    assert len({sample.text for sample in found[0]}) > 15


def test_an_answer_ends_with_the_turn_or_at_the_limit(model: Model) -> None:
    found = answers(model, TEXTS, Sampling(200, 2.0, 3))
    ended = [answer for answer in found if answer.ended]
    assert 0 < len(ended) < len(found)  # 433 tokens, one of them EOS: some end by chance within 200
    assert all("</s>" not in answer.text for answer in found)


def test_stop_texts_end_an_answer_also_across_tokens(model: Model) -> None:
    whole = answers(model, TEXTS[:30], GREEDY)
    tokens = {model.text([token]) for answer in whole for token in model.tokens(answer.text)}
    stops = {answer.text[place : place + 3] for answer in whole for place in (4, 9)} - tokens
    stops = {stop for stop in stops if "\ufffd" not in stop}
    stopped = answers(model, TEXTS[:30], replace(GREEDY, stop=tuple(stop.encode() for stop in stops)))
    for before, after in zip(whole, stopped, strict=True):
        first = min((before.text.find(stop) for stop in stops if stop in before.text), default=None)
        assert after.text == before.text[:first]
        assert after.ended == (first is not None)
    assert sum(after.ended for after in stopped) > 20


def shares(sampling: Sampling, logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(5)
    drawn = [draw(logits, sampling, random) for _ in range(4000)]
    return np.bincount(drawn, minlength=len(logits)) / 4000


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param({}, [0.4, 0.05, 0.3, 0.25], id="all"),
        pytest.param({"top_k": 2}, [4 / 7, 0, 3 / 7, 0], id="top-k"),
        pytest.param({"top_p": 0.7}, [4 / 7, 0, 3 / 7, 0], id="top-p-that-is-just-reached"),
        pytest.param({"top_p": 0.71}, [8 / 19, 0, 6 / 19, 5 / 19], id="top-p"),
        pytest.param({"min_p": 0.7}, [4 / 7, 0, 3 / 7, 0], id="min-p"),
        pytest.param({"top_k": 3, "top_p": 0.4}, [1, 0, 0, 0], id="top-p-of-what-top-k-left"),
        pytest.param({"temperature": 0.5}, np.square([0.4, 0.05, 0.3, 0.25]) / 0.315, id="temperature"),
    ],
)
def test_tokens_are_drawn_from_the_narrowed_distribution(settings: Any, expected: list[float]) -> None:
    logits = np.log(np.array([0.4, 0.05, 0.3, 0.25], np.float32))
    found = shares(Sampling(1, **{"temperature": 1.0, "seed": 0, **settings}), logits)
    assert found == pytest.approx(expected, abs=0.03)
    assert set(np.flatnonzero(found)) == set(np.flatnonzero(expected))


def table(work: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(work.output / "predictions.parquet").to_pylist()
    return rows


def test_the_stage_writes_free_answers(micro: Any, dataset: Make, make_work: Make, labelled: Make) -> None:
    rows = [*labelled(20), ("", "nothing")]
    work = make_work(micro.gguf.parent, dataset(rows, (), "text"), max_new_tokens=5)
    facts = predict(work)
    found = table(work)
    assert all(row["label"] and row["ended"] is not None and row["logprob"] < 0 for row in found[:20])
    assert (found[20]["label"], found[20]["error"], found[20]["ended"]) == (None, "empty text", None)
    assert facts["cut_off"] == sum(row["ended"] is False for row in found)
    assert all(row["probability"] is None and row["samples"] is None for row in found)


def test_the_stage_writes_further_samples_beside_the_first(
    micro: Any, dataset: Make, make_work: Make, labelled: Make
) -> None:
    data = dataset(labelled(10), (), "text")
    settings = {"max_new_tokens": 6, "temperature": 1.0}
    one = make_work(micro.gguf.parent, data, "one", **settings)
    three = make_work(micro.gguf.parent, data, "three", **settings, n=3)
    predict(one)
    predict(three)
    assert [row["label"] for row in table(three)] == [row["label"] for row in table(one)]
    for row in table(three):
        assert len({row["label"], *row["samples"]}) == len({row["logprob"], *row["sample_logprobs"]}) == 3


def test_room_for_the_answer_is_kept(micro: Any, dataset: Make, make_work: Make) -> None:
    data = dataset([("x" * 900, ""), ("y", "")], (), "text")
    work = make_work(micro.gguf.parent, data, max_new_tokens=200)
    predict(work)
    long, short = table(work)
    assert long["error"].endswith("tokens of prompt and 200 of answer, at most 1024")
    assert short["error"] is None


def test_neither_settings_of_the_run_nor_an_interruption_change_a_byte_of_samples(
    micro: Any, dataset: Make, make_work: Make, labelled: Make
) -> None:
    data = dataset(labelled(150), (), "text")
    settings = {"max_new_tokens": 6, "temperature": 0.8, "n": 3, "block_rows": 80}

    def work(name: str, **run: Any) -> Any:
        return make_work(micro.gguf.parent, data, name, **settings, **run)

    few, many, broken = work("few", n_threads=1, n_batch=256), work("many", n_threads=3), work("broken")

    class StopAtSecondBlock(threading.Event):
        def is_set(self) -> bool:
            return (broken.scratch / "blocks" / "000000.parquet").exists()

    with pytest.raises(Stopped):
        predict(replace(broken, stop=StopAtSecondBlock()))
    for one in (few, many, broken):
        predict(one)
    assert len({(one.output / "predictions.parquet").read_bytes() for one in (few, many, broken)}) == 1


@pytest.mark.parametrize(
    ("form", "settings", "said"),
    [
        ("label", {"stop": ("a", "b")}, "stop is for free answers, and this task's answers are one label"),
        ("label", {"choices": ("a", "b")}, "choices is for free answers, and this task's"),
        ("text", {"max_pruned": 0.1}, "max_pruned is for one label of a set or several labels"),
        (
            "text",
            {"decoding": "greedy"},
            "decoding is for one label of a set, and this task's answers are free",
        ),
    ],
)
def test_settings_of_another_form_are_refused(
    micro: Any, dataset: Make, make_work: Make, form: str, settings: dict[str, Any], said: str
) -> None:
    data = dataset([("text", "data")], () if form == "text" else ("data", "files"), form)
    with pytest.raises(ConfigurationError, match=f"^{said}"):
        predict(make_work(micro.gguf.parent, data, **settings))

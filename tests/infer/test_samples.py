"""``infer --id``: rows to look at, answered as the stage answers them, and nothing published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backends import provenance
from tunemill import cli
from tunemill.progress import Progress
from tunemill.store import Draft, open_store

Make = Callable[..., Any]
WORDS = ("infer", "--run", "micro-parts", "--store", "store", "--set", "quant=F16", "--set", "n_threads=1")


@pytest.fixture
def ask(
    micro: Any,
    dataset: Make,
    labelled: Make,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[int, str, str]]:
    """Return the command over a store with a model and rows, the tenth of which has no text."""
    monkeypatch.setenv("TUNEMILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    store = open_store("store", create=True)
    given = labelled(12)
    given[9] = (" ", given[9][1])
    for name, kind, directory in (("gguf-f16", "gguf", micro.gguf.parent), ("data", "data", dataset(given))):
        store.publish(
            Draft(f"micro-parts/{name}", kind, directory, {}, provenance(inputs={})), Progress(quiet=True)
        )

    def call(*more: str) -> tuple[int, str, str]:
        capfd.readouterr()
        cli._talk_on_stderr()
        return cli.run([*WORDS, *more]), *capfd.readouterr()

    return call


def test_rows_are_shown_with_prompt_answer_and_gold(ask: Any, tmp_path: Path) -> None:
    code, shown, talk = ask("--id", "row-3", "--id", "row-9", "--json")
    assert code == 0, talk
    third, empty = json.loads(shown)
    assert third["prompt"].startswith("<s>[which part: ")
    assert third["gold"] == "data types"
    shares = third["probabilities"]
    assert sum(shares.values()) == pytest.approx(1)
    assert third["answer"] == max(shares, key=shares.get) == next(iter(shares))
    assert (empty["answer"], empty["error"]) == (None, "empty text")
    code, text, _ = ask("--id", "row-3")
    assert code == 0
    assert f"answer  {third['answer']}\n  {shares[third['answer']]:.4f}  {third['answer']}\n" in text
    assert text.endswith("gold    data types\n")
    assert [path.name for path in (tmp_path / "cache").glob("tmp*")] == []
    assert open_store("store", create=False).find("micro-parts/predictions-f16") is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(("--id", "row-99"), "the split test has no row 'row-99'", id="unknown"),
        pytest.param(("--id", "row-1", "--set", "shard_count=2"), "joins shards", id="join"),
        pytest.param(("--id", "row-1", "--set", "quant=Q8_0"), "micro-parts/gguf-q8_0", id="no-model"),
    ],
)
def test_what_cannot_be_shown_is_one_line(ask: Any, words: tuple[str, ...], said: str) -> None:
    code, shown, talk = ask(*words)
    assert (code, shown) == (2, "")
    assert said in talk.splitlines()[-1]

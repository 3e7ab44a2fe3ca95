"""The same bytes however much is computed at once: what docs/inference.md promises on a CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunemill.gguf.quantizer import quantize
from tunemill.infer.engine import Batch, Engine, Size, join, run_of
from tunemill.infer.model import Model
from tunemill.infer.predict import predict
from tunemill.llama import load_llama

Make = Callable[..., Any]
TYPES = {"F16": None, "Q8_0": 7, "Q4_K_M": 15}
"""Names with llama.cpp's numbers; F16 is what the model is made in."""
KNOBS = (
    {},
    {"n_batch": 64, "n_threads": 1},
    {"n_batch": 200, "n_parallel": 3, "n_threads": 2},
    {"n_parallel": 1, "n_threads": 3},
)


@pytest.fixture(scope="module", params=TYPES)
def typed(request: pytest.FixtureRequest, wide: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each type, with its prompting."""
    if TYPES[request.param] is None:
        return Path(wide.gguf)
    target = tmp_path_factory.mktemp(request.param) / "model.gguf"
    quantize(load_llama(), str(wide.gguf), str(target), {"ftype": TYPES[request.param], "nthread": 1})
    shutil.copyfile(wide.gguf.parent / "prompting.json", target.parent / "prompting.json")
    return target


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        pytest.param("label", {}, id="labels"),
        pytest.param("label", {"max_pruned": 0.05}, id="labels-left-out"),
        pytest.param("label", {"max_pruned": 1, "decoding": "greedy"}, id="greedy-labels"),
        pytest.param("text", {"max_new_tokens": 6, "temperature": 1.0}, id="free-answers"),
    ],
)
def test_how_much_is_computed_at_once_changes_no_byte(
    typed: Path, dataset: Make, make_work: Make, labelled: Make, form: str, settings: dict[str, Any]
) -> None:
    rows = [*labelled(50), ("it " * 120, "data")]
    data = dataset(
        rows, () if form == "text" else ("networking", "net services", "data", "data types", "files"), form
    )
    files = []
    for number, knobs in enumerate(KNOBS):
        work = make_work(typed.parent, data, f"out-{number}", block_rows=30, **settings, **knobs)
        predict(work)
        files.append((work.output / "predictions.parquet").read_bytes())
    assert files[1:] == files[:1] * (len(KNOBS) - 1)


def many(count: int, vocabulary: int, start: int) -> Batch:
    """Make texts of many lengths, each in its own sequence, with some logits wanted."""
    random = np.random.default_rng(3)
    parts = []
    while sum(len(part.tokens) for part in parts) < count:
        part = run_of(
            random.integers(3, vocabulary, random.integers(3, 40)).tolist(), start, [len(parts)], True
        )
        part.outputs[:] |= random.random(len(part.outputs)) < 0.4
        parts.append(part)
    return join(parts)


def cut(batch: Batch, size: int) -> list[Batch]:
    """Cut a batch of single sequences into pieces."""
    fields = (batch.tokens, batch.positions, batch.counts, batch.members, batch.outputs)
    starts = range(0, len(batch.tokens), size)
    return [Batch(*(field[start : start + size] for field in fields)) for start in starts]


@pytest.mark.parametrize("flash", [False, True], ids=["plain", "flash-attention"])
def test_logits_have_the_same_bits_wherever_a_batch_is_cut(typed: Path, flash: bool) -> None:
    prefix = tuple(range(40, 77))
    with Model(typed) as model:
        found = []
        for most, size in ((512, 512), (512, 97), (64, 512), (128, 31)):
            with Engine(model, Size(512, most, flash), 1) as engine:
                engine.share(prefix[:20])
                engine.share(prefix)
                batch = many(300, model.vocabulary, len(prefix))
                found.append(np.concatenate([np.array(engine.decode(piece)) for piece in cut(batch, size)]))
    assert all(np.array_equal(found[0], other) for other in found[1:])
    assert found[0].std() > 0

"""``tunemill quantize --types``: several quantizations, compared, and one recommended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tunemill.commands.side_by_side import parse_memory
from tunemill.errors import UsageError
from tunemill.gguf.footprint import footprint
from tunemill.gguf.header import read_gguf
from tunemill.gguf.writer import write_gguf
from tunemill.store import open_store

from .test_host_class import make_lab

TYPES = ["quantize", "--run", "lab", "--types"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """A store with a model that is not as sure as to answer alike whatever its type."""
    return make_lab(tmp_path_factory.mktemp("lab"), sureness=0.02)


@pytest.fixture
def call(lab, tmp_path, monkeypatch, command_line):
    monkeypatch.setenv("TUNEMILL_STORE", str(shutil.copytree(lab, tmp_path / "store")))
    monkeypatch.setenv("TUNEMILL_CACHE", str(tmp_path / "cache"))
    return command_line


def test_types_stand_side_by_side_and_the_best_that_fits_is_named(call, tmp_path):
    code, stdout, stderr = call(*TYPES, "Q4_0,q8_0", "--memory-budget", "1GB")
    assert code == 0, stderr
    title, *rows = stdout.splitlines()
    assert title.split()[:3] == ["type", "size", "needs"]
    assert [row.split()[0] for row in rows[:2]] == ["Q4_0", "Q8_0"]
    assert "keys and values for 64 tokens in F16" in rows[2]
    assert rows[3] == "recommended for 1.00 GB: Q8_0, which diverges least of those that fit"
    store = open_store(str(tmp_path / "store"))
    assert {"lab/gguf-q4_0", "lab/gguf-q8_0"} <= set(store.names())
    alone = call("quantize", "--run", "lab", "--set", "quant=Q4_0")
    assert alone[1].strip() == store.resolve("lab/gguf-q4_0").reference
    assert "reusing" in alone[2]


def test_a_budget_between_two_types_takes_the_smaller_one(call):
    record = json.loads(call(*TYPES, "Q4_0,Q8_0", "--json", "--memory-budget", "1GB")[1])
    small, large = record["types"]
    assert record["recommended"] == "Q8_0"
    assert small["bytes"] < large["bytes"]
    assert 0 < large["parity"]["mean_kl"] < small["parity"]["mean_kl"]
    assert large["parity"]["flips"] == 0
    assert min(small["tokens_per_second"].values()) > 0
    parts = [small["memory"][part] for part in ("weights", "cache", "computing")]
    assert small["memory"]["total"] == sum(parts)
    between = (small["memory"]["total"] + large["memory"]["total"]) // 2
    again = json.loads(call(*TYPES, "Q4_0,Q8_0", "--json", "--memory-budget", f"{between}")[1])
    assert again["recommended"] == "Q4_0"
    code, stdout, _ = call(*TYPES, "Q4_0,Q8_0", "--memory-budget", "1MB")
    assert code == 0
    assert "none fits into 1.00 MB: the smallest, Q4_0, needs" in stdout


def test_a_type_beyond_its_limits_does_not_keep_the_others_from_being_shown(call, tmp_path):
    code, stdout, stderr = call(*TYPES, "Q4_0,Q8_0", "--set", "quantize_max_mean_kl=1e-5")
    assert code == 65
    assert stdout.splitlines()[1].split()[0] == "Q8_0"
    assert "Q4_0 was not made: " in stderr.splitlines()[-1]
    assert "lab/gguf-q4_0" not in set(open_store(str(tmp_path / "store")).names())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(["Q4_0,Q9_0"], "unknown quant 'Q9_0'", id="unknown"),
        pytest.param(["Q4_0,IQ2_XS"], "IQ2_XS needs an importance matrix", id="imatrix"),
        pytest.param(["Q4_0", "--memory-budget", "much"], "--memory-budget much", id="budget"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_is_made(call, tmp_path, words, said):
    code, stdout, stderr = call(*TYPES, *words)
    assert (code, stdout) == (2, "")
    assert said in stderr
    assert "lab/gguf-q4_0" not in set(open_store(str(tmp_path / "store")).names())


def test_a_dry_run_makes_none(call, tmp_path):
    code, stdout, _ = call(*TYPES, "Q4_0,Q8_0", "--dry-run", "--json")
    assert code == 0
    planned = [each["output"] for each in json.loads(stdout)["types"]]
    assert planned == ["lab/gguf-q4_0", "lab/gguf-q8_0"]
    assert "lab/gguf-q4_0" not in set(open_store(str(tmp_path / "store")).names())


@pytest.mark.parametrize(
    ("text", "count"),
    [("6GB", 6 * 10**9), ("6 gib", 6 << 30), ("1.5G", 1500000000), ("512M", 512000000), ("123", 123)],
)
def test_amounts_of_memory(text, count):
    assert parse_memory(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "6TB!", "1e9"])
def test_what_is_no_amount(text):
    with pytest.raises(UsageError, match="expected an amount"):
        parse_memory(text)


def test_the_cache_is_counted_by_layer_and_head(tmp_path: Path):
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 3,
        "llama.embedding_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": [2, 1, 1],
        "llama.attention.value_length": 8,
        "llama.feed_forward_length": 100,
        "tokenizer.ggml.tokens": [f"t{number}" for number in range(200)],
    }
    write_gguf(tmp_path / "x.gguf", metadata, {"a": np.ones((4, 32), np.float16)})
    found = footprint(read_gguf(tmp_path / "x.gguf"), context=10)
    assert found.weights == 256
    assert found.cache == 10 * (2 + 1 + 1) * (64 // 4 + 8) * 2
    assert found.computing == 512 * (200 + 2 * 100 + 4 * 64) * 4
    assert found.total == found.weights + found.cache + found.computing

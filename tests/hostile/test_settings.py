"""Configurations and tokenizers of wrong types, of great depth, or made to take for ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

DEEP = b'{"a":' * 200_000 + b"1" + b"}" * 200_000
LISTS = b'{"a":[' + b"[]," * 4_000_000 + b"0]}"
WRONG = {
    "empty": b"",
    "cut": b'{"model_type": "llama"',
    "list": b"[]",
    "null": b"null",
    "deep": DEEP,
    "no-text": b"\xff\xfe\x00",
    "many-digits": b'{"hidden_size": ' + b"9" * 1_000_000 + b"}",
    "lists-of-12-mb": LISTS,
    "larger-than-any": b'{"a": "' + b"x" * (50 << 20) + b'"}',
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_models_settings(hostile, name, content):
    if name == "tokenizer_config.json" and content is LISTS:
        content = b'{"chat_template":[' + b"[]," * 4_000_000 + b"0]}"
    if name == "config.json" and content is LISTS:
        content = b'{"auto_map":[' + b"[]," * 4_000_000 + b"0]}"
    line = hostile("fetch", "base", lambda d: take(d, name, content))
    assert name in line or "chat template" in line


def take(directory: Path, name: str, content: bytes) -> None:
    (directory / "chat_template.jinja").unlink()
    (directory / name).write_bytes(content)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"r": "2"}, id="rank-is-a-text"),
        pytest.param({"r": 0}, id="rank-0"),
        pytest.param({"r": -2}, id="rank-negative"),
        pytest.param({"r": 10**400}, id="rank-without-end"),
        pytest.param({"lora_alpha": None}, id="no-alpha"),
        pytest.param({"lora_alpha": 1e308 * 10}, id="alpha-infinite"),
        pytest.param({"peft_type": ["LORA"]}, id="type-is-a-list"),
        pytest.param({"peft_type": "PROMPT_TUNING"}, id="another-type"),
        pytest.param({"rank_pattern": ["q_proj"]}, id="pattern-is-a-list"),
        pytest.param({"rank_pattern": {"(.|.)*x": 2}}, id="pattern-for-ever"),
        pytest.param({"rank_pattern": {"(" * 150: 2}}, id="pattern-malformed"),
        pytest.param({"alpha_pattern": {"x" * 5000: 2}}, id="pattern-long"),
        pytest.param({"use_rslora": "yes"}, id="truth-is-a-text"),
    ],
)
def test_an_adapters_settings_in_merge(hostile, changes):
    assert "adapter" in hostile("merge", "adapter", lambda d: edit(d / "adapter_config.json", changes))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"r": "2", "use_rslora": True}, id="rank-is-a-text"),
        pytest.param({"r": 0, "use_rslora": True}, id="rank-0"),
        pytest.param({"r": -2, "use_rslora": True}, id="rank-negative"),
        pytest.param({"lora_alpha": [1]}, id="alpha-is-a-list"),
        pytest.param({"lora_alpha": None}, id="no-alpha"),
        pytest.param({"target_modules": "(a+)+$" * 50, "peft_type": "LOHA"}, id="another-type"),
    ],
)
def test_an_adapters_settings_in_convert_lora(hostile, changes):
    assert "adapter" in hostile("convert-lora", "adapter", lambda d: edit(d / "adapter_config.json", changes))


def test_an_adapters_settings_thousands_deep(hostile):
    line = hostile("convert-lora", "adapter", lambda d: (d / "adapter_config.json").write_bytes(DEEP))
    assert "adapter_config.json" in line


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"num_hidden_layers": 10**9}, id="layers"),
        pytest.param({"architectures": "LlamaForCausalLM"}, id="architecture-is-a-text"),
        pytest.param({"num_attention_heads": 0}, id="no-heads"),
        pytest.param({"vocab_size": 10**12}, id="vocabulary"),
        pytest.param({"architectures": ["../../outside"]}, id="architecture-climbs"),
    ],
)
def test_a_models_shape_in_convert(hostile, changes):
    assert hostile("convert", "merged", lambda d: edit(d / "config.json", changes))


def edit(path: Path, changes: dict[str, object]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tokenizer(pre_tokenizer: object = None, normalizer: object = None, model: object = None) -> bytes:
    usual = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    parts = {"version": "1.0", "added_tokens": [], "post_processor": None, "decoder": None}
    parts |= {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "model": model or usual}
    return json.dumps(parts).encode()


def split(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


TOKENIZERS = {
    "no-json": b"{",
    "deep": DEEP,
    "larger-than-any": b'{"a": "' + b"x" * (50 << 20) + b'"}',
    "lists-of-30-mb": b'{"version":"1.0","added_tokens":[' + b"[]," * 10_000_000 + b"0]}",
    "backtracking": tokenizer(split("(a+)+$")),
    "backtracking-on-spaces": tokenizer(split("(\\s|\\s)*\\S{3}$")),
    "huge-expression": tokenizer(split("(" * 50_000 + ")" * 50_000)),
    "broken-expression": tokenizer(split("(")),
    "growing-normalizer": tokenizer(
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}] * 9,
        }
    ),
    "negative-ids": tokenizer(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}),
    "merges-of-nothing": tokenizer(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}),
    "unknown-model": tokenizer(model={"type": "Pickle", "path": "/etc/passwd"}),
    "model-is-a-number": tokenizer(model=5),
}


@pytest.mark.parametrize("content", TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_a_tokenizer(hostile, content):
    assert "tokenizer.json" in hostile("fetch", "base", lambda d: (d / "tokenizer.json").write_bytes(content))


@pytest.mark.parametrize("name", ["backtracking", "growing-normalizer"])
@pytest.mark.parametrize(("stage", "role"), [("prepare", "base"), ("convert", "merged")], ids=lambda x: x)
def test_a_tokenizer_in_any_stage(hostile, stage, role, name):
    content = TOKENIZERS[name]
    assert "tokenizer.json" in hostile(stage, role, lambda d: (d / "tokenizer.json").write_bytes(content))


def test_a_sentencepiece_model_that_is_none(hostile):
    line = hostile("prepare", "base", lambda d: (d / "tokenizer.model").write_bytes(b"\xff" * 10_000))
    assert "tokenizer" in line

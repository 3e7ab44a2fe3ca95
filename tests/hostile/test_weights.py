"""Safetensors files and indexes that lie, through the stages that read them."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def packed(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def entry(start: int = 0, end: int = 8, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


MANY = b"{" + b",".join(b'"%d":{}' % n for n in range(2_000_000)) + b"}"
FORGED = {
    "empty": b"",
    "length-of-all": packed({"a": entry()}, b"\0" * 8, length=(1 << 64) - 1),
    "length-past-the-end": packed({"a": entry()}, length=1 << 20),
    "header-of-40-mib": packed(b" " * (40 << 20)),
    "two-million-names": packed(MANY),
    "two-million-lists": packed(b"[" + b"[]," * 2_000_000 + b"0]"),
    "deep": packed(b"[" * 3_000_000),
    "deep-objects": packed(b'{"a":' * 1_000_000),
    "number-of-a-million-digits": packed(b'{"a":' + b"9" * 1_000_000 + b"}"),
    "no-text": packed(b"\xff" * 64),
    "name-twice": packed(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 8),
    "overlap": packed({"a": entry(), "b": entry(4, 12)}, b"\0" * 12),
    "same-bytes": packed({"a": entry(), "b": entry()}, b"\0" * 8),
    "hole": packed({"a": entry(), "b": entry(16, 24)}, b"\0" * 24),
    "hole-at-the-start": packed({"a": entry(8, 16)}, b"\0" * 16),
    "out-of-the-file": packed({"a": entry(0, 1 << 40, (1 << 38,))}, b"\0" * 8),
    "before-the-file": packed({"a": entry(-8, 0)}, b"\0" * 8),
    "backwards": packed({"a": entry(8, 0)}, b"\0" * 8),
    "overflowing-shape": packed({"a": entry(shape=(1 << 32, 1 << 32))}, b"\0" * 8),
    "negative-shape": packed({"a": entry(shape=(-1, -2))}, b"\0" * 8),
    "shape-of-a-hundred": packed({"a": entry(shape=[1] * 100 + [2])}, b"\0" * 8),
    "shape-is-a-text": packed({"a": entry(shape="2")}, b"\0" * 8),
    "type-of-no-one": packed({"a": entry(dtype="F31")}, b"\0" * 8),
    "type-of-another-size": packed({"a": entry(dtype="F64")}, b"\0" * 8),
    "type-is-an-object": packed({"a": entry(dtype={})}, b"\0" * 8),
    "bytes-after-the-last": packed({"a": entry()}, b"\0" * 4096),
    "pickle": b"\x80\x04cos\nsystem\n(S'touch ../outside.txt'\ntR.",
}


@pytest.mark.parametrize("content", FORGED.values(), ids=FORGED.keys())
def test_fetch_refuses(hostile, content):
    assert "safetensors" in hostile("fetch", "base", lambda d: (d / WEIGHTS).write_bytes(content))


@pytest.mark.parametrize("name", ["overlap", "length-of-all", "deep-objects"])
@pytest.mark.parametrize(
    ("stage", "role", "file"),
    [
        ("merge", "base", WEIGHTS),
        ("merge", "adapter", "adapter_model.safetensors"),
        ("convert", "merged", WEIGHTS),
        ("convert-lora", "adapter", "adapter_model.safetensors"),
    ],
    ids=["merge-base", "merge-adapter", "convert", "convert-lora"],
)
def test_every_stage_refuses(hostile, stage, role, file, name):
    assert "safetensors" in hostile(stage, role, lambda d: (d / file).write_bytes(FORGED[name]))


@pytest.mark.parametrize(
    "names",
    [
        pytest.param({"a": "../outside.safetensors"}, id="climbs"),
        pytest.param({"a": "/etc/passwd"}, id="absolute"),
        pytest.param({"a": "sub/../../outside.safetensors"}, id="climbs-from-below"),
        pytest.param({"a": "model.safetensors\0.safetensors"}, id="zero-byte"),
        pytest.param({"a": "x" * 5000 + ".safetensors"}, id="long-name"),
        pytest.param({"a": "model.bin"}, id="pickle"),
        pytest.param({"a": ["model.safetensors"]}, id="list"),
        pytest.param({"a": None}, id="null"),
        pytest.param({"other": "model.safetensors"}, id="another-tensor"),
        pytest.param([], id="no-object"),
    ],
)
def test_an_index_that_points_elsewhere(hostile, names):
    def damage(directory: Path) -> None:
        (directory.parent / "outside.safetensors").write_bytes((directory / WEIGHTS).read_bytes())
        (directory / INDEX).write_text(json.dumps({"weight_map": names}))

    assert INDEX in hostile("fetch", "base", damage)


@pytest.mark.parametrize("text", [b"[" * 500_000, b'{"weight_map": 5}', b"{"], ids=["deep", "number", "cut"])
def test_an_index_that_is_none(hostile, text):
    assert INDEX in hostile("fetch", "base", lambda d: (d / INDEX).write_bytes(text))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model", "LICENSE", "config.json"])
def test_a_link_out_of_the_directory(hostile, name):
    def damage(directory: Path) -> None:
        outside = directory.parent / "secret"
        outside.write_text("not the model's to publish")
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(outside)

    assert "is a link to" in hostile("fetch", "base", damage)


def test_a_link_to_a_device(hostile):
    def damage(directory: Path) -> None:
        (directory / "config.json").unlink()
        (directory / "config.json").symlink_to("/dev/zero")

    assert "config.json" in hostile("fetch", "base", damage)


def test_a_pipe_in_place_of_weights(hostile):
    def damage(directory: Path) -> None:
        (directory / WEIGHTS).unlink()
        os.mkfifo(directory / WEIGHTS)

    assert hostile("fetch", "base", damage)

"""GGUF files whose headers lie, through quantize; the worst through infer too."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

U8, U32, TEXT, ARRAY = 0, 4, 8, 9
HUGE = (1 << 64) - 1


def text(value: str, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, length: int, entries: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, length) + entries


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ARCHITECTURE = pair("general.architecture", TEXT, text("llama"))


def gguf(pairs=(ARCHITECTURE,), tensors=(), data=b"", version=3, counts=None) -> bytes:
    many = counts or (len(tensors), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, *many) + b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def nested(depth: int) -> bytes:
    return array(ARRAY, 1) * depth + array(U32, 1, b"\0" * 4)


STRINGS = b"".join(text("") for _ in range(1 << 18))
FORGED = {
    "nothing": b"",
    "magic-alone": b"GGUF",
    "another-format": b"\x80\x02}q\x00." * 40,
    "version-1": gguf(version=1),
    "big-endian": gguf(version=3 << 24),
    "most-tensors": gguf(counts=(HUGE, 1)),
    "most-keys": gguf(counts=(0, HUGE)),
    "negative-counts": gguf(counts=(1 << 63, 1 << 63)),
    "more-tensors-than-bytes": gguf(counts=(1 << 16, 1)),
    "more-keys-than-bytes": gguf(counts=(0, 1 << 13)),
    "key-of-4-gib": gguf([text("k", 1 << 32)]),
    "text-of-all-bytes": gguf([pair("k", TEXT, text("v", HUGE))]),
    "text-of-1-gib": gguf([pair("k", TEXT, text("v", 1 << 30))]),
    "array-of-all": gguf([pair("k", ARRAY, array(U32, HUGE))]),
    "array-that-overflows": gguf([pair("k", ARRAY, array(U32, 1 << 62))]),
    "array-past-the-end": gguf([pair("k", ARRAY, array(U8, 1 << 22))]),
    "array-in-array": gguf([pair("k", ARRAY, nested(1))]),
    "arrays-thousands-deep": gguf([pair("k", ARRAY, nested(100_000))]),
    "arrays-of-empty-texts": gguf([pair(f"k{n}", ARRAY, array(TEXT, 1 << 18, STRINGS)) for n in range(33)]),
    "value-of-no-type": gguf([pair("k", 13, b"\0" * 8)]),
    "key-twice": gguf([ARCHITECTURE, ARCHITECTURE]),
    "key-without-name": gguf([pair("", U32, b"\0" * 4)]),
    "tensor-twice": gguf(tensors=[tensor("a", [8]), tensor("a", [8], offset=32)], data=b"\0" * 64),
    "tensors-overlap": gguf(tensors=[tensor("a", [8]), tensor("b", [8])], data=b"\0" * 64),
    "hole": gguf(tensors=[tensor("a", [8]), tensor("b", [8], offset=64)], data=b"\0" * 96),
    "offset-before-the-data": gguf(tensors=[tensor("a", [8], offset=HUGE - 31)], data=b"\0" * 32),
    "offset-past-the-end": gguf(tensors=[tensor("a", [8], offset=1 << 40)], data=b"\0" * 32),
    "size-that-overflows": gguf(tensors=[tensor("a", [1 << 32, 1 << 32])], data=b"\0" * 32),
    "four-dimensions-of-all": gguf(tensors=[tensor("a", [HUGE] * 4)], data=b"\0" * 32),
    "no-dimensions": gguf(tensors=[tensor("a", [])], data=b"\0" * 32),
    "five-dimensions": gguf(tensors=[tensor("a", [1] * 5)], data=b"\0" * 32),
    "dimensions-without-end": gguf(tensors=[text("a") + struct.pack("<I", 1 << 31)]),
    "unknown-tensor-type": gguf(tensors=[tensor("a", [32], kind=1000)], data=b"\0" * 32),
    "half-a-block": gguf(tensors=[tensor("a", [33], kind=8)], data=b"\0" * 68),
    "long-name": gguf(tensors=[tensor("n" * 64, [8])], data=b"\0" * 32),
    "data-cut": gguf(tensors=[tensor("a", [1024])], data=b"\0" * 4095),
    "data-added": gguf(tensors=[tensor("a", [8])], data=b"\0" * 32) + b"\0" * 4096,
    "alignment-0": gguf([pair("general.alignment", U32, struct.pack("<I", 0))]),
    "alignment-3": gguf([pair("general.alignment", U32, struct.pack("<I", 3))]),
    "alignment-2-gib": gguf([pair("general.alignment", U32, struct.pack("<I", 1 << 31))]),
    "alignment-is-a-text": gguf([pair("general.alignment", TEXT, text("32"))]),
}


def replace(content: bytes):
    def damage(directory: Path) -> None:
        next(directory.glob("*.gguf")).write_bytes(content)

    return damage


@pytest.mark.parametrize("content", FORGED.values(), ids=FORGED.keys())
def test_quantize_refuses(hostile, content):
    assert "is not a whole GGUF file" in hostile("quantize", "gguf", replace(content))


@pytest.mark.parametrize("name", ["most-keys", "array-that-overflows", "size-that-overflows"])
def test_infer_refuses(hostile, name):
    assert ".gguf" in hostile("infer", "gguf", replace(FORGED[name]))


def without(key: bytes):
    """Rename a key, so that llama.cpp does not find it in a file that is otherwise whole."""

    def damage(directory: Path) -> None:
        path = next(directory.glob("*.gguf"))
        path.write_bytes(path.read_bytes().replace(key, b"x" * len(key)))

    return damage


@pytest.mark.parametrize(
    "key", [b"llama.block_count", b"tokenizer.ggml.tokens", b"blk.0.attn_q.weight"], ids=bytes.decode
)
@pytest.mark.parametrize("stage", ["quantize", "infer"])
def test_what_only_llama_cpp_can_notice(hostile, stage, key):
    assert hostile(stage, "gguf", without(key))


def set_number(key: bytes, value: int):
    def damage(directory: Path) -> None:
        path = next(directory.glob("*.gguf"))
        content = bytearray(path.read_bytes())
        place = content.index(key) + len(key) + 4
        content[place : place + 4] = struct.pack("<I", value)
        path.write_bytes(bytes(content))

    return damage


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"llama.block_count", 1 << 31),
        (b"llama.attention.head_count", 0),
        (b"llama.embedding_length", 1 << 30),
    ],
    ids=["blocks", "no-heads", "width"],
)
def test_numbers_that_make_llama_cpp_stumble(hostile, key, value):
    assert ".gguf" in hostile("infer", "gguf", set_number(key, value))


@pytest.mark.parametrize("names", [("a.gguf", "b.gguf"), ("m-00001-of-00003.gguf",)], ids=["two", "a-part"])
def test_more_or_less_than_one_model(hostile, names):
    def damage(directory: Path) -> None:
        content = next(directory.glob("*.gguf"))
        for name in names:
            (directory / name).write_bytes(content.read_bytes())
        content.unlink()

    assert ".gguf" in hostile("quantize", "gguf", damage)

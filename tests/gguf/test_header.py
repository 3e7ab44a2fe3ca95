"""The GGUF header reader against whole, cut, and forged files."""

import struct
import time
import tracemalloc

import pytest

from tunemill.errors import BadDataError
from tunemill.gguf import header as module
from tunemill.gguf.header import Long, read_gguf

U32, FLOAT, TEXT, ARRAY, U64 = 4, 6, 8, 9, 10


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, entries: list[bytes], length: int | None = None) -> bytes:
    return struct.pack("<IQ", kind, len(entries) if length is None else length) + b"".join(entries)


def tensor(name: str, shape: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ARCHITECTURE = pair("general.architecture", TEXT, text("llama"))


def gguf(
    pairs=(ARCHITECTURE,), tensors=(), data=b"", version=3, magic=b"GGUF", counts=None, align=32
) -> bytes:
    many_tensors, many_pairs = counts or (len(tensors), len(pairs))
    head = (
        magic + struct.pack("<IQQ", version, many_tensors, many_pairs) + b"".join(pairs) + b"".join(tensors)
    )
    return head + b"\0" * (-len(head) % align) + data


@pytest.fixture
def read(tmp_path):
    def write_and_read(content: bytes):
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return read_gguf(path)

    return write_and_read


GOOD = gguf(
    pairs=[
        ARCHITECTURE,
        pair("general.file_type", U32, struct.pack("<I", 15)),
        pair("x.scale", FLOAT, struct.pack("<f", 0.5)),
        pair("x.words", ARRAY, array(TEXT, [text("a"), text(b"\xe2\x96")])),
        pair("x.many", ARRAY, array(U32, [struct.pack("<I", n) for n in range(100)])),
    ],
    tensors=[tensor("a.weight", [32, 2], 8, 0), tensor("b.weight", [3], 0, 96)],
    data=b"\1" * 68 + b"\0" * 28 + b"\2" * 12,
)


def test_reads_a_whole_file(read):
    header = read(GOOD)
    assert (header.architecture, header.file_type, header.version) == ("llama", "Q4_K_M", 3)
    assert header.metadata["x.scale"] == 0.5
    assert header.metadata["x.words"] == ("a", "\N{REPLACEMENT CHARACTER}")
    assert header.metadata["x.many"] == Long(100)
    assert header.types() == {"F32": 1, "Q8_0": 1}
    first, second = header.tensors
    assert GOOD[first.start : first.start + first.size] == b"\1" * 68
    assert GOOD[second.start : second.start + second.size] == b"\2" * 12


def test_accepts_padding_after_the_last_tensor(read):
    assert read(GOOD + b"\0" * 20).size == len(GOOD) + 20


def test_every_cut_is_noticed(read):
    for length in range(len(GOOD)):
        with pytest.raises(BadDataError, match="not a whole GGUF"):
            read(GOOD[:length])


ONE = tensor("a", [4], 0, 0)
FORGED = {
    "empty": b"",
    "another-format": gguf(magic=b"GGML"),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "version-1": gguf(version=1),
    "version-99": gguf(version=99),
    "many-tensors": gguf(counts=(1 << 60, 1)),
    "many-keys": gguf(counts=(0, 1 << 60)),
    "fewer-keys-than-said": gguf(counts=(0, 2)),
    "long-key": gguf([struct.pack("<Q", 1 << 62) + b"x"]),
    "key-twice": gguf([ARCHITECTURE, ARCHITECTURE]),
    "long-text": gguf([text("k") + struct.pack("<IQ", TEXT, 1 << 40)]),
    "unknown-value": gguf([pair("k", 99, b"\0" * 8)]),
    "long-array": gguf([pair("k", ARRAY, array(U32, [], 1 << 50))]),
    "array-past-the-end": gguf([pair("k", ARRAY, array(U64, [], 1 << 20))]),
    "texts-past-the-end": gguf([pair("k", ARRAY, array(TEXT, [text("x")], 1 << 20))]),
    "array-of-arrays": gguf([pair("k", ARRAY, array(ARRAY, [array(U32, [])]))]),
    "array-of-unknown": gguf([pair("k", ARRAY, array(77, [b"\0"]))]),
    "no-dimensions": gguf(tensors=[tensor("a", [], 0, 0)]),
    "nine-dimensions": gguf(tensors=[tensor("a", [1] * 9, 0, 0)], data=b"\0" * 4),
    "unknown-type": gguf(tensors=[tensor("a", [4], 200, 0)], data=b"\0" * 16),
    "removed-type": gguf(tensors=[tensor("a", [4], 4, 0)], data=b"\0" * 16),
    "odd-width": gguf(tensors=[tensor("a", [33], 8, 0)], data=b"\0" * 68),
    "long-name": gguf(tensors=[tensor("a" * 64, [4], 0, 0)], data=b"\0" * 16),
    "same-name": gguf(tensors=[ONE, tensor("a", [4], 0, 32)], data=b"\0" * 48),
    "overlap": gguf(tensors=[ONE, tensor("b", [4], 0, 0)], data=b"\0" * 48),
    "gap": gguf(tensors=[ONE, tensor("b", [4], 0, 64)], data=b"\0" * 80),
    "first-offset": gguf(tensors=[tensor("a", [4], 0, 32)], data=b"\0" * 48),
    "huge-tensor": gguf(tensors=[tensor("a", [1 << 40, 1 << 40], 0, 0)], data=b"\0" * 16),
    "overflowing-tensor": gguf(tensors=[tensor("a", [1 << 33, 1 << 33, 1 << 33], 0, 0)], data=b"\0" * 16),
    "too-many-rows": gguf(tensors=[tensor("a", [1 << 63], 0, 0)], data=b"\0" * 16),
    "trailing-bytes": gguf(tensors=[ONE], data=b"\0" * 16) + b"\0" * 17,
    "alignment-zero": gguf([pair("general.alignment", U32, struct.pack("<I", 0))]),
    "alignment-odd": gguf([pair("general.alignment", U32, struct.pack("<I", 48))]),
    "alignment-text": gguf([pair("general.alignment", TEXT, text("32"))]),
}


@pytest.mark.parametrize("content", FORGED.values(), ids=FORGED.keys())
def test_forged_headers_are_refused_at_once(read, content):
    tracemalloc.start()
    begin = time.monotonic()
    with pytest.raises(BadDataError) as caught:
        read(content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert "model.gguf" in str(caught.value)
    assert time.monotonic() - begin < 2
    assert peak < 10_000_000


def test_the_elements_of_all_arrays_are_bounded(read, monkeypatch):
    monkeypatch.setattr(module, "MAX_ELEMENTS", 150)
    hundred = array(U32, [b"\0" * 4] * 100)
    assert read(gguf([pair("a", ARRAY, hundred)]))
    with pytest.raises(BadDataError, match="more than 150"):
        read(gguf([pair("a", ARRAY, hundred), pair("b", ARRAY, hundred)]))


def test_a_missing_file(tmp_path):
    with pytest.raises(BadDataError, match="cannot be read"):
        read_gguf(tmp_path / "none.gguf")


def test_numbers_are_those_of_the_installed_library(converter):
    """Block sizes from ggml itself, file types from llama_cpp's constants."""
    import ctypes
    from pathlib import Path

    import llama_cpp

    from tunemill.gguf.types import BLOCKS, FILE_TYPES

    base = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/*ggml-base.*"))))
    base.ggml_blck_size.restype = ctypes.c_int64
    base.ggml_type_size.restype = ctypes.c_size_t
    base.ggml_type_name.restype = ctypes.c_char_p
    for number, (name, numbers, size) in BLOCKS.items():
        if name == "Q8_K":
            continue  # exists only inside dot products; no file holds it
        assert base.ggml_type_name(number).decode().upper() == name
        assert (base.ggml_blck_size(number), base.ggml_type_size(number)) == (numbers, size), name
    for name, number in FILE_TYPES.items():
        constant = "LLAMA_FTYPE_ALL_F32" if name == "F32" else f"LLAMA_FTYPE_MOSTLY_{name}"
        assert getattr(llama_cpp, constant) == number

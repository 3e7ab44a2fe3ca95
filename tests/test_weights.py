"""The safetensors header reader against whole, cut, and forged files."""

import json
import struct

import numpy as np
import pytest

from tunemill.errors import BadDataError
from tunemill.weights import BITS, INDEX, read_header, read_headers, weight_files


def packed(entries, data=b"", length=None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), start=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.fixture
def read(tmp_path):
    def write_and_read(content: bytes):
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        return read_header(path)

    return write_and_read


def test_agrees_with_the_library(tmp_path):
    from safetensors.numpy import save_file

    arrays = {
        "b": np.arange(6, dtype=np.float16).reshape(2, 3),
        "a": np.arange(4, dtype=np.int64),
        "scalar": np.array(7, dtype=np.float32),
        "empty": np.zeros((0, 4), dtype=np.uint8),
    }
    path = tmp_path / "x.safetensors"
    save_file(arrays, path, metadata={"format": "pt"})
    header, content = read_header(path), path.read_bytes()
    assert header.metadata == {"format": "pt"}
    assert header.size == len(content)
    for name, array in arrays.items():
        tensor = header.tensors[name]
        assert tensor.shape == array.shape
        assert content[tensor.start : tensor.start + tensor.size] == array.tobytes()


def test_every_cut_is_noticed(read):
    whole = packed({"a": entry(), "b": entry("BF16", (2, 2), 8, 16)}, b"\0" * 16)
    assert set(read(whole).tensors) == {"a", "b"}
    for length in range(len(whole)):
        with pytest.raises(BadDataError, match="not a whole safetensors"):
            read(whole[:length])


FORGED = {
    "empty": b"",
    "a-length-alone": struct.pack("<Q", 10),
    "huge-length": packed({"a": entry()}, b"\0" * 8, length=1 << 62),
    "length-past-the-end": packed({"a": entry()}, b"", length=1000),
    "no-json": packed(b"{not json"),
    "no-object": packed(b"[1, 2]"),
    "deep-json": packed(b"[" * 200_000),
    "no-text": packed(b"\xff\xfe{}"),
    "name-twice": packed(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 8),
    "no-offsets": packed({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
    "entry-is-a-number": packed({"a": 5}),
    "unknown-type": packed({"a": entry("F33")}, b"\0" * 8),
    "type-is-a-list": packed({"a": entry(["F32"])}, b"\0" * 8),
    "negative-shape": packed({"a": entry(shape=(-2, -1))}, b"\0" * 8),
    "shape-of-texts": packed({"a": entry(shape=("2",))}, b"\0" * 8),
    "shape-of-truth": packed({"a": entry(shape=(True, 2))}, b"\0" * 8),
    "shape-too-large": packed({"a": entry(shape=(1 << 40, 1 << 40))}, b"\0" * 8),
    "many-dimensions": packed({"a": entry(shape=(1,) * 9, end=4)}, b"\0" * 4),
    "backward-offsets": packed({"a": entry(start=8, end=0)}, b"\0" * 8),
    "fractional-offsets": packed({"a": entry(end=8.0)}, b"\0" * 8),
    "three-offsets": packed({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, b"\0" * 8),
    "wrong-size": packed({"a": entry(end=12)}, b"\0" * 12),
    "overlap": packed({"a": entry(), "b": entry(start=4, end=12)}, b"\0" * 12),
    "same-place": packed({"a": entry(), "b": entry()}, b"\0" * 8),
    "gap": packed({"a": entry(), "b": entry(start=12, end=20)}, b"\0" * 20),
    "gap-at-the-start": packed({"a": entry(start=4, end=12)}, b"\0" * 12),
    "trailing-bytes": packed({"a": entry()}, b"\0" * 9),
    "metadata-of-numbers": packed({"__metadata__": {"n": 1}, "a": entry()}, b"\0" * 8),
    "metadata-is-a-list": packed({"__metadata__": ["x"], "a": entry()}, b"\0" * 8),
}


@pytest.mark.parametrize("content", FORGED.values(), ids=FORGED.keys())
def test_forged_headers_are_refused(read, content):
    with pytest.raises(BadDataError) as caught:
        read(content)
    message = str(caught.value)
    assert "\n" not in message
    assert "model.safetensors is not a whole safetensors file" in message
    assert len(message) < 600


def test_types_are_those_of_the_library():
    import safetensors.torch as library

    assert set(library._TYPES) <= set(BITS)


@pytest.fixture
def sharded(tmp_path):
    (tmp_path / "one.safetensors").write_bytes(packed({"a": entry()}, b"\0" * 8))
    (tmp_path / "two.safetensors").write_bytes(packed({"b": entry()}, b"\0" * 8))

    def index(weight_map) -> None:
        (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    index({"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path, index


def test_shards_in_the_order_of_their_names(sharded):
    directory, _ = sharded
    assert [path.name for path in weight_files(directory)] == ["one.safetensors", "two.safetensors"]
    assert [list(header.tensors) for header in read_headers(directory)] == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        pytest.param({"a": "../one.safetensors"}, "not a safetensors file beside it", id="climbs"),
        pytest.param({"a": "/etc/passwd"}, "not a safetensors file beside it", id="absolute"),
        pytest.param({"a": "model.bin"}, "not a safetensors file beside it", id="pickle"),
        pytest.param({"a": "three.safetensors"}, "lacks three.safetensors", id="missing"),
        pytest.param(
            {"a": "two.safetensors", "b": "one.safetensors"}, "puts a in two.safetensors", id="swapped"
        ),
        pytest.param({"a": "one.safetensors"} | {"c": "two.safetensors"}, "puts b in None", id="unnamed"),
        pytest.param({}, "no weight_map", id="empty"),
        pytest.param(["a"], "no weight_map", id="list"),
    ],
)
def test_an_index_that_does_not_agree(sharded, weight_map, words):
    directory, index = sharded
    index(weight_map)
    with pytest.raises(BadDataError, match=words.replace(".", r"\.")):
        read_headers(directory)


def test_a_tensor_in_two_files(sharded):
    directory, _ = sharded
    (directory / "two.safetensors").write_bytes(packed({"a": entry()}, b"\0" * 8))
    with pytest.raises(BadDataError, match="both in one"):
        read_headers(directory)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(BadDataError, match="no safetensors weights"):
        read_headers(tmp_path)


def test_a_missing_file(tmp_path):
    with pytest.raises(BadDataError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")

"""Quantization by llama.cpp, of every type, and what stops it."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tunemill.errors import BadDataError, TransientError, UsageError
from tunemill.gguf.config import ConvertConfig, QuantizeConfig
from tunemill.gguf.convert import convert
from tunemill.gguf.header import read_gguf
from tunemill.gguf.imatrix import FILE as IMATRIX
from tunemill.gguf.imatrix import Imatrix, write_imatrix
from tunemill.gguf.library import Library
from tunemill.gguf.quantize import check, quantize
from tunemill.gguf.types import FILE_TYPES, MADE, NEED_IMATRIX, QUANTS, file_type, tensor_type
from tunemill.ggufs import find_gguf

from .conftest import converted_from, save_llama


@pytest.fixture(scope="session")
def small(made, data, converter, tmp_path_factory) -> Path:
    """An F16 GGUF of one layer: the smallest types take ten seconds for a million numbers."""
    folder = tmp_path_factory.mktemp("small")
    model = Path(shutil.copytree(made, folder / "model"))
    save_llama(model, num_hidden_layers=1)
    return converted_from(model, data, folder)


@pytest.fixture
def gguf(converted, tmp_path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "gguf"))


@pytest.fixture(scope="session")
def matrix(converted, tmp_path_factory) -> Path:
    """An importance matrix of random numbers, for what only asks that there is one."""
    folder = tmp_path_factory.mktemp("matrix")
    chance = np.random.default_rng(3)
    shapes = {t.name: t.shape for t in read_gguf(converted / "model-F16.gguf").tensors if len(t.shape) == 2}
    sums = {name: chance.uniform(1, 9, (1, shape[0])) for name, shape in shapes.items() if "blk" in name}
    counts = {name: np.array([3.0]) for name in sums}
    write_imatrix(folder / IMATRIX, Imatrix(sums, counts, ("random",), 1, 64))
    return folder


@pytest.fixture
def inputs(converted, matrix):
    """What a configuration takes."""
    return lambda config, gguf=converted: {"gguf": gguf, **({"imatrix": matrix} if config.imatrix else {})}


@pytest.mark.parametrize("quant", QUANTS)
def test_every_type(work, small, inputs, quant):
    config = QuantizeConfig(quant=quant, n_threads=1, imatrix=quant in NEED_IMATRIX)
    this = work(config, **inputs(config, small))
    facts = quantize(this)
    header = read_gguf(this.output / f"model-{quant}.gguf")
    assert header.file_type == quant == facts["file_type"]
    assert facts["bytes"] < (0.6 if quant != "MXFP4_MOE" else 0.65) * facts["bytes_before"]
    assert len(header.tensors) == len(read_gguf(small / "model-F16.gguf").tensors)
    assert facts["fallbacks"] == {}
    assert {path.name for path in this.output.iterdir()} == {f"model-{quant}.gguf", "prompting.json"}


def test_facts_name_the_library_and_the_machine(work, converted):
    facts = quantize(work(QuantizeConfig(), gguf=converted))
    assert facts["llama_cpp"] == "0.3.36"
    assert "CPU" in facts["system_info"]
    assert facts["ggml"].split()[0].count(".") == 2


def test_same_input_gives_the_same_bytes_whatever_the_threads(work, converted, tmp_path):
    first = work(QuantizeConfig(n_threads=1), gguf=converted)
    quantize(first)
    first.output.rename(tmp_path / "first")
    second = work(QuantizeConfig(n_threads=3), gguf=converted)
    quantize(second)
    assert (tmp_path / "first/model-Q4_K_M.gguf").read_bytes() == (
        second.output / "model-Q4_K_M.gguf"
    ).read_bytes()


def test_overrides_of_single_tensors(work, converted):
    config = QuantizeConfig(output_tensor_type="Q8_0", token_embedding_type="Q5_K", pure=True)
    this = work(config, gguf=converted)
    quantize(this)
    types = {t.name: t.type for t in read_gguf(this.output / "model-Q4_K_M.gguf").tensors}
    assert types["output.weight"] == "Q8_0"
    assert types["token_embd.weight"] == "Q5_K"
    assert types["blk.0.attn_v.weight"] == "Q4_K"


def test_types_by_pattern_the_first_match_counts(work, converted):
    words = (r"blk\.0\.ffn_(up|down)=Q6_K", "ffn_up=Q5_0", "attn_k=BF16")
    this = work(QuantizeConfig(quant="Q4_0", tensor_type=words), gguf=converted)
    quantize(this)
    types = {t.name: t.type for t in read_gguf(this.output / "model-Q4_0.gguf").tensors}
    assert types["blk.0.ffn_up.weight"] == types["blk.0.ffn_down.weight"] == "Q6_K"
    assert types["blk.1.ffn_up.weight"] == "Q5_0"
    assert types["blk.1.ffn_down.weight"] == types["blk.0.attn_q.weight"] == "Q4_0"
    assert types["blk.0.attn_k.weight"] == types["blk.1.attn_k.weight"] == "BF16"


@pytest.mark.parametrize("types", [MADE[:14], MADE[14:]], ids=["first-half", "second-half"])
def test_every_tensor_type(converted, matrix, tmp_path, types):
    """A model of 14 matrices, each of another type."""
    library = Library(tmp_path, threading.Event())
    source, target = converted / "model-F16.gguf", tmp_path / "x.gguf"
    names = sorted(t.name for t in read_gguf(source).tensors if "blk" in t.name and len(t.shape) == 2)
    wanted = dict(zip(names, types, strict=False))
    overrides = [(name, tensor_type(kind)) for name, kind in wanted.items()]
    settings = {"ftype": file_type("Q8_0"), "nthread": 1}
    library.quantize(source, target, settings, lambda: None, overrides, matrix / IMATRIX)
    made = {t.name: t.type for t in read_gguf(target).tensors}
    assert {name: made[name] for name in wanted} == wanted
    assert len(wanted) == len(types)


def test_a_pattern_that_is_found_nowhere(work, converted):
    this = work(QuantizeConfig(tensor_type=("attn_v=Q8_0", "atn_k=Q8_0")), gguf=converted)
    with pytest.raises(UsageError, match=r"atn_k=Q8_0: no tensor .* is called so"):
        quantize(this)
    assert not list(this.output.iterdir())


def test_an_imatrix_changes_the_bytes_not_the_size_and_is_named(work, converted, inputs, tmp_path):
    first = work(QuantizeConfig(quant="Q2_K"), gguf=converted)
    quantize(first)
    first.output.rename(tmp_path / "first")
    config = QuantizeConfig(quant="Q2_K", imatrix=True)
    second = work(config, **inputs(config))
    quantize(second)
    plain, guided = read_gguf(tmp_path / "first/model-Q2_K.gguf"), read_gguf(find_gguf(second.output))
    assert {t.name: t.size for t in plain.tensors} == {t.name: t.size for t in guided.tensors}
    assert plain.path.read_bytes()[-4096:] != guided.path.read_bytes()[-4096:]
    assert guided.metadata["quantize.imatrix.file"] == IMATRIX
    assert guided.metadata["quantize.imatrix.entries_count"] == 14
    assert guided.metadata["quantize.imatrix.dataset"] == "random"


def test_widths_that_a_type_cannot_take_are_reported(work, model, data, make_llama, tmp_path, converter):
    """320 is no multiple of 256: llama.cpp takes another type for such a tensor and says so."""
    make_llama(model, intermediate_size=320, num_hidden_layers=1)
    first = work(ConvertConfig(), merged=model, data=data)
    convert(first)
    first.output.rename(tmp_path / "first")
    facts = quantize(work(QuantizeConfig(), gguf=tmp_path / "first"))
    assert list(facts["fallbacks"]) == ["blk.0.ffn_down.weight"]
    assert "320 columns" in facts["fallbacks"]["blk.0.ffn_down.weight"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param({"quant": "Q4_K_X"}, ["'Q4_K_X'", "Q4_K_"], id="unknown"),
        pytest.param({"quant": "q4_k_m"}, ["did you mean Q4_K_M"], id="lower-case"),
        pytest.param({"quant": "NVFP4"}, ["makes no such file", "tensor_type"], id="only-run"),
        pytest.param({"quant": "F16"}, ["outtype=f16"], id="not-quantized"),
        pytest.param({"quant": "IQ2_XS"}, ["IQ2_XS", "importance matrix", "imatrix=true"], id="imatrix"),
        pytest.param(
            {"tensor_type": ("ffn_up=IQ1_M",)}, ["IQ1_M", "importance matrix"], id="a-tensors-imatrix"
        ),
        pytest.param({"tensor_type": ("ffn_up=Q8_1",)}, ["'Q8_1'", "did you mean"], id="only-computed-with"),
        pytest.param({"tensor_type": ("attn_v",)}, ["PATTERN=TYPE", "'attn_v'"], id="no-type"),
        pytest.param({"tensor_type": ("blk.(=Q8_0",)}, ["'blk.('", "regular expression"], id="no-pattern"),
        pytest.param({"output_tensor_type": "Q8"}, ["'Q8'", "Q8_"], id="tensor-type"),
    ],
)
def test_unknown_types(config, words):
    with pytest.raises(UsageError) as caught:
        check(QuantizeConfig(**config))
    assert all(word in str(caught.value) for word in words)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("quant", NEED_IMATRIX)
def test_types_that_need_an_imatrix_are_known(converted, tmp_path, quant):
    """llama.cpp itself refuses those that ``check`` refuses; it makes all the others."""
    library = Library(tmp_path, threading.Event())
    with pytest.raises(BadDataError, match="requires an imatrix"):
        library.quantize(
            converted / "model-F16.gguf", tmp_path / "x.gguf", {"ftype": file_type(quant)}, lambda: None
        )


def test_no_type_of_the_library_is_missing():
    """llama.cpp's own names: its numbers are ``LLAMA_FTYPE_MOSTLY_NAME``, and those beyond are refused."""
    import llama_cpp

    prefix = "LLAMA_FTYPE_MOSTLY_"
    known = {name.removeprefix(prefix): number for name, number in vars(llama_cpp).items() if prefix in name}
    assert known == {name: number for name, number in FILE_TYPES.items() if name != "F32"}


def refused(this, *words):
    with pytest.raises(BadDataError) as caught:
        quantize(this)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_quantized_input(work, converted, tmp_path):
    first = work(QuantizeConfig(quant="Q8_0"), gguf=converted)
    quantize(first)
    first.output.rename(tmp_path / "first")
    refused(work(QuantizeConfig(), gguf=tmp_path / "first"), "model-Q8_0.gguf", "quantized already")


def test_a_truncated_input(work, gguf):
    path = find_gguf(gguf)
    path.write_bytes(path.read_bytes()[:-100_000])
    refused(work(QuantizeConfig(), gguf=gguf), "model-F16.gguf", "header describes")


def test_a_vocabulary_that_llama_cpp_refuses(work, gguf):
    """The header is in order, so only the library itself can tell; it must not take us along."""
    path = find_gguf(gguf)
    content = path.read_bytes()
    assert content.count(b"tokenizer.ggml.model") == 1
    path.write_bytes(content.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.modes"))
    refused(work(QuantizeConfig(), gguf=gguf), "model-")


def test_numbers_that_are_none(work, gguf):
    """A flipped bit can make an F16 infinite; llama.cpp validates what it quantizes."""
    path = find_gguf(gguf)
    tensor = next(t for t in read_gguf(path).tensors if t.name == "blk.0.ffn_up.weight")
    with path.open("r+b") as file:
        file.seek(tensor.start)
        file.write(b"\xff\x7f" * 32)
    refused(work(QuantizeConfig(quant="Q8_0"), gguf=gguf), "quantizing model-F16.gguf")


def test_a_full_disk_is_noticed_before(work, converted, small_disk):
    this = replace(work(QuantizeConfig(), gguf=converted), output=small_disk(64 << 10))
    with pytest.raises(TransientError, match="free some space"):
        quantize(this)


def test_a_disk_that_fills_up_meanwhile(converted, tmp_path, small_disk):
    library = Library(tmp_path, threading.Event())
    target = small_disk(64 << 10) / "x.gguf"
    with pytest.raises(TransientError, match="no space left"):
        library.quantize(converted / "model-F16.gguf", target, {"ftype": 7, "nthread": 1}, lambda: None)


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"]])
def test_one_file_is_expected(work, tmp_path, names):
    folder = tmp_path / "gguf"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"GGUF")
    refused(work(QuantizeConfig(), gguf=folder), "expected one GGUF")

"""The check of an installed llama.cpp: that it passes here, and what it would not let through."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunemill.errors import BadDataError, ConfigurationError
from tunemill.gguf import selfcheck
from tunemill.gguf.header import read_gguf
from tunemill.host import this_host

USING = "llama_model_load_from_file_impl: using device {} ({}) (0000:17:00.0) - 81000 MiB free\n"
OFFLOADED = "load_tensors: offloaded {} layers to GPU\n"
H200 = USING.format("CUDA0", "NVIDIA H200")


def test_it_passes_on_what_is_installed(capfd: pytest.CaptureFixture[str]) -> None:
    assert selfcheck.main([]) == 0
    stdout, stderr = capfd.readouterr()
    assert stdout.startswith(f"{this_host().backend}: llama-cpp-python {this_host().llama_cpp} quantized to ")
    assert stdout.count("\n") == 1
    assert stderr == ""


@pytest.mark.skipif(this_host().backend != "cpu", reason="this llama.cpp is built for a GPU")
def test_another_backend_than_the_installed_one_is_refused() -> None:
    assert selfcheck.main(["cuda"]) == 78
    assert selfcheck.main(["abacus"]) == 78


@pytest.mark.parametrize(
    ("backend", "said", "device"),
    [
        pytest.param("cuda", H200 + OFFLOADED.format("3/3"), "NVIDIA H200"),
        pytest.param("metal", USING.format("MTL0", "Apple M2") + OFFLOADED.format("3/3"), "Apple M2"),
        pytest.param("cpu", "load_tensors: CPU_Mapped model buffer size = 2.76 MiB\n", this_host().processor),
    ],
)
def test_the_device_is_named(backend: str, said: str, device: str) -> None:
    assert selfcheck._device(backend, said) == device


@pytest.mark.parametrize(
    ("backend", "said", "reason"),
    [
        pytest.param("cuda", "", "no layer on a GPU", id="silently the CPU"),
        pytest.param(
            "cuda",
            H200 + OFFLOADED.format("1/3"),
            "offloaded 1/3",
            id="a part",
        ),
        pytest.param(
            "cuda", USING.format("Vulkan0", "llvmpipe") + OFFLOADED.format("3/3"), "Vulkan0", id="another"
        ),
        pytest.param("cpu", H200 + OFFLOADED.format("3/3"), "CUDA0", id="a GPU"),
    ],
)
def test_a_silent_fallback_is_noticed(backend: str, said: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        selfcheck._device(backend, said)


def test_a_wrong_result_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The model repeats its last byte instead of counting on, as broken kernels might."""
    monkeypatch.setattr(selfcheck.np, "roll", lambda array, *_, **__: array)
    with pytest.raises(ConfigurationError, match=r"computes wrongly on .* it counted 'aaaaaaaa'"):
        selfcheck.check(this_host().backend, tmp_path)


def test_a_model_that_does_not_load_is_an_error(tmp_path: Path) -> None:
    selfcheck.write_gguf(tmp_path / "x.gguf", {"general.architecture": "llama"}, {})
    with pytest.raises(BadDataError, match=r"running x\.gguf"):
        selfcheck._count(tmp_path / "x.gguf", tmp_path)


def test_the_model_is_a_whole_gguf(tmp_path: Path) -> None:
    selfcheck.write_counting_model(tmp_path / "model.gguf")
    header = read_gguf(tmp_path / "model.gguf")
    assert (header.architecture, header.file_type) == ("llama", "F16")
    assert header.metadata["tokenizer.ggml.add_space_prefix"] is False


def test_which_architectures_are_known(tmp_path: Path) -> None:
    assert [selfcheck.knows(name, tmp_path) for name in ("llama", "qwen3", "fancy")] == [True, True, False]

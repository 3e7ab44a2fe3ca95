"""What is read about a machine, from what real machines say."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tunemill.host import FEATURES, Gpu, parse_cpuinfo, parse_nvidia, this_host
from tunemill.kernels import build_in, compiler_of

X86 = """\
processor\t: 0
model name\t: Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz
flags\t\t: fpu vme avx avx2 avx512f avx512_vnni fma
processor\t: 1
model name\t: another
flags\t\t: fpu
"""
ARM = """\
processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd evtstrm aes asimddp sve i8mm bf16
CPU implementer\t: 0x41
"""


def test_the_first_processor_stands_for_all() -> None:
    name, features = parse_cpuinfo(X86)
    assert name == "Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz"
    assert features & FEATURES == {"avx", "avx2", "avx512f", "avx512_vnni", "fma"}


def test_arm_names_its_features_differently() -> None:
    name, features = parse_cpuinfo(ARM)
    assert name == "0x41"
    assert features & FEATURES == {"asimd", "asimddp", "sve", "i8mm", "bf16"}


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        pytest.param("NVIDIA H200, 9.0, 143771\n", (Gpu("NVIDIA H200", "sm_90", 143771 << 20),), id="one"),
        pytest.param(
            "NVIDIA A100-SXM4-40GB, 8.0, 40960\nTesla P40, 6.1, 24576\n",
            (Gpu("NVIDIA A100-SXM4-40GB", "sm_80", 40960 << 20), Gpu("Tesla P40", "sm_61", 24576 << 20)),
            id="two kinds",
        ),
        pytest.param("No devices were found\n", (), id="none"),
        pytest.param("X, [N/A], 5\n", (), id="not told"),
        pytest.param("", (), id="nothing"),
    ],
)
def test_what_nvidia_smi_says(text: str, gpus: tuple[Gpu, ...]) -> None:
    assert parse_nvidia(text) == gpus


def test_this_host_is_a_plain_record() -> None:
    record = this_host().record()
    assert json.loads(json.dumps(record)) == record
    assert record["memory"] > 1 << 28
    if Path("/proc/cpuinfo").exists():
        assert set(record["features"]) <= parse_cpuinfo(Path("/proc/cpuinfo").read_text())[1]


def test_a_gpu_is_classed_by_its_architecture_not_by_its_number() -> None:
    card = Gpu("NVIDIA H200", "sm_90", 1)
    one = replace(this_host(), backend="cuda", gpus=(card,))
    assert replace(one, gpus=(card, card)).host_class == one.host_class
    assert replace(one, gpus=(replace(card, architecture="sm_80"),)).host_class != one.host_class
    assert one.host_class.startswith("cuda/sm_90/")


def test_the_kernels_in_use_are_of_this_processor() -> None:
    host = this_host()
    if host.llama_cpp is None:
        pytest.skip("llama.cpp is not installed here")
    assert host.kernels
    assert host.ggml.count(".") == 2
    assert re.fullmatch("[0-9a-f]{8}", host.rounding)
    if host.machine == "x86_64" and Path("/proc/cpuinfo").exists():
        flags = parse_cpuinfo(Path("/proc/cpuinfo").read_text())[1]
        assert {"avx2", "fma", "f16c"} & set(host.kernels) <= flags


def test_a_compiler_is_known_by_what_it_signs(tmp_path: Path) -> None:
    library = tmp_path / "x.so"
    library.write_bytes(b"\0" * ((1 << 20) - 9) + b"GCC: (Debian 12.2.0-14) 12.2.0\0GCC: (GNU) 4.8.5\0")
    assert compiler_of(library) == "gcc-12.2.0"
    library.write_bytes(b"Debian clang version 19.1.7 (3)\0")
    assert compiler_of(library) == "clang-19.1.7"
    library.write_bytes(b"nothing")
    assert compiler_of(library) == "-"


def test_libraries_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "libggml-base.so").write_bytes(b"no library")
    assert build_in(tmp_path) is None


def test_two_builds_are_two_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.environ.get("TUNEMILL_OTHER_LLAMA")
    if not other:
        pytest.skip("TUNEMILL_OTHER_LLAMA names no folder with a llama.cpp that was compiled otherwise")
    here = this_host()
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", other)
    this_host.cache_clear()
    assert this_host().host_class != here.host_class
    this_host.cache_clear()

"""Asks the llama.cpp that is installed here what it was compiled for, in a short child process.

Two builds of one version on one processor may round differently: one has kernels for AVX-512, the other
has not, or the compiler fuses other operations. So a quantization is bound to the kernels that are in use,
and not to what the processor could do. The libraries are opened as llama.cpp opens them: of several
compiled for different processors the one that scores best here. They are never opened in this process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

VARIABLE = "LLAMA_CPP_LIB_PATH"
SECONDS = 60
READ_AT_ONCE = 1 << 20
COMPILERS = {
    "gcc": re.compile(rb"GCC: \([^)\0]{0,80}\) (\d+\.\d+\.\d+)"),
    "clang": re.compile(rb"clang version (\d+\.\d+\.\d+)"),
}
"""How compilers sign what they make; Apple's does not."""
PROGRAM = """
import ctypes, glob, hashlib, json, os, sys
folder = sys.argv[1]
paths = lambda name: sorted({os.path.realpath(p) for p in glob.glob(os.path.join(folder, "*" + name + "*"))})
base = ctypes.CDLL(paths("ggml-base.")[0], mode=ctypes.RTLD_GLOBAL)
best, score = None, -1
for path in paths("ggml-cpu"):
    library = ctypes.CDLL(path)
    if hasattr(library, "ggml_backend_score"):
        found = library.ggml_backend_score()
        if found == 0:
            continue
    else:
        found = 0
    if found > score:
        best, score = (path, library), found
names = sys.argv[2].split()
has = [name for name in names if getattr(best[1], "ggml_cpu_has_" + name, int)()]
def rounding():
    count, numbers, seed = 8192, [], 1
    for place in range(count):
        seed = (1103515245 * seed + 12345) % (1 << 31)
        numbers.append((seed / (1 << 30) - 1) * (1 + place // 512))
    source, target = (ctypes.c_float * count)(*numbers), ctypes.create_string_buffer(4 * count)
    weights = (ctypes.c_float * count)(*(1 + abs(number) for number in numbers))
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    number, place = ctypes.c_int64, ctypes.c_void_p
    base.ggml_quantize_chunk.argtypes = [ctypes.c_int, place, place, number, number, number, place]
    digest = hashlib.sha256()
    for kind in map(int, sys.argv[3].split()):
        size = base.ggml_quantize_chunk(kind, source, target, 0, count // 256, 256, weights)
        digest.update(target.raw[:size])
    return digest.hexdigest()[:8]
base.ggml_version.restype = base.ggml_commit.restype = ctypes.c_char_p
told = {"kernels": has, "path": best[0], "ggml": base.ggml_version().decode(), "rounding": rounding()}
print(json.dumps(told))
"""
KERNELS = (
    "amx_int8 arm_fma avx avx2 avx512 avx512_bf16 avx512_vbmi avx512_vnni avx_vnni bmi2 dotprod f16c fma "
    "fp16_va llamafile matmul_int8 neon riscv_v sme sse3 ssse3 sve vsx vxe"
)
"""What ``ggml_cpu_has_NAME`` is asked for."""
QUANTIZED = "2 3 6 7 8 10 11 12 13 14 20 21 23"
"""Tensor types, by number, that some fixed numbers are quantized to; those left out take long to begin."""


@dataclass(frozen=True)
class Build:
    """One compiled llama.cpp, on this processor."""

    kernels: tuple[str, ...]
    """Instruction sets in use, by ggml's names, sorted."""
    compiler: str
    """``gcc-12.2.0``, or ``-`` where it does not tell."""
    ggml: str
    """ggml's version."""
    rounding: str
    """Eight hex digits of a sha256 over some fixed numbers, quantized to most types: builds that round
    otherwise, for whatever reason, are told apart by it."""


def installed() -> Path | None:
    """Return the folder of the compiled libraries, without importing anything; None if there are none.

    ``LLAMA_CPP_LIB_PATH`` is llama-cpp-python's own variable for libraries that were built elsewhere.
    """
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen)
    spec = find_spec("llama_cpp")
    places = [Path(place, "lib") for place in spec.submodule_search_locations or ()] if spec else []
    return next((place for place in places if any(place.glob("*ggml-base*"))), None)


@lru_cache(maxsize=4)
def build_in(folder: Path) -> Build | None:
    """Return what the libraries in a folder are; None where they cannot be opened on this machine."""
    command = [sys.executable, "-I", "-S", "-c", PROGRAM, str(folder), KERNELS, QUANTIZED]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
        told = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None  # the stage that loads them will say what is wrong
    return Build(
        tuple(sorted(told["kernels"])), compiler_of(Path(told["path"])), told["ggml"], told["rounding"]
    )


def compiler_of(library: Path) -> str:
    """Return the newest compiler that signed a library; the C runtime's own may be an older one."""
    found: set[tuple[tuple[int, ...], str]] = set()
    before = b""
    with library.open("rb") as source:
        while chunk := source.read(READ_AT_ONCE):
            for name, pattern in COMPILERS.items():
                for version in pattern.findall(before + chunk):
                    number = version.decode()
                    found.add((tuple(map(int, number.split("."))), f"{name}-{number}"))
            before = chunk[-128:]
    return max(found)[1] if found else "-"

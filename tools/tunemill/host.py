"""What this machine is: processor, GPU, memory, and the llama.cpp that is installed.

The fingerprint goes into every artifact's provenance. Its ``host_class`` is what a quantization is
bound to: backend, device architecture, the kernels in use, compiler and llama.cpp build. All of it is
read without importing llama.cpp.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from tunemill.kernels import build_in, installed

# Instruction sets that llama.cpp has kernels for; others change no result and would only split classes.
FEATURES = frozenset(
    (  # noqa: SIM905 - a list of one word a line would be longer than the rest of the module's constants
        "avx avx2 fma f16c bmi2 sse4_2 avx_vnni avx512f avx512bw avx512_vnni avx512_bf16 avx512_fp16 "
        "amx_int8 asimd neon asimddp i8mm bf16 sve sve2 sme fphp vsx vxe rvv"
    ).split()
)
# sysctl names on Apple silicon, and what Linux calls the same.
APPLE_FEATURES = {"AdvSIMD": "asimd", "FEAT_DotProd": "asimddp", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16"}
BACKENDS = ("cuda", "hip", "metal", "sycl", "vulkan")


@dataclass(frozen=True)
class Gpu:
    """One graphics processor."""

    name: str
    architecture: str
    """``sm_90`` for CUDA, ``apple`` for Metal."""
    memory: int
    """Bytes; 0 where it is the main memory."""


@dataclass(frozen=True)
class Host:
    """This machine."""

    system: str
    """``Linux`` or ``Darwin``."""
    machine: str
    """``x86_64``, ``aarch64`` or ``arm64``."""
    processor: str
    features: tuple[str, ...]
    cores: int
    memory: int
    """Bytes."""
    gpus: tuple[Gpu, ...]
    python: str
    llama_cpp: str | None
    """Version of llama-cpp-python, which pins llama.cpp; None where it is not installed."""
    backend: str
    """What the installed llama.cpp computes on: ``cpu`` or one of ``BACKENDS``."""
    kernels: tuple[str, ...]
    """Instruction sets that the installed llama.cpp was compiled to use and this processor has."""
    compiler: str
    """What compiled it, such as ``gcc-12.2.0``; ``-`` where that is not known."""
    ggml: str
    """Version of its tensor library; ``-`` where there is none."""
    rounding: str
    """What it makes of some fixed numbers, as eight hex digits; ``-`` where it cannot be asked."""

    @property
    def device(self) -> str:
        """Architecture of what computes: the machine's, or the GPUs'."""
        if self.backend == "cpu":
            return self.machine
        return "+".join(sorted({gpu.architecture for gpu in self.gpus}))

    @property
    def host_class(self) -> str:
        """Backend, architecture, kernels, compiler, llama.cpp: equal classes compute alike."""
        build = f"llama-{self.llama_cpp}-ggml-{self.ggml}-{self.rounding}"
        return "/".join((self.backend, self.device, "+".join(self.kernels) or "-", self.compiler, build))

    def record(self) -> dict[str, Any]:
        """Return it as plain JSON values, the class included."""
        return {**json.loads(json.dumps(asdict(self))), "host_class": self.host_class}


@lru_cache(maxsize=1)
def this_host() -> Host:
    """Look at this machine, once."""
    processor, features = _apple_processor() if sys.platform == "darwin" else _linux_processor()
    gpus = _apple_gpu() if sys.platform == "darwin" else _nvidia_gpus()
    libraries = installed()
    build = build_in(libraries) if libraries else None
    return Host(
        system=platform.system(),
        machine=platform.machine(),
        processor=processor,
        features=tuple(sorted(features & FEATURES)),
        cores=os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=gpus,
        python=platform.python_version(),
        llama_cpp=_installed("llama-cpp-python"),
        backend=_backend(gpus, libraries),
        kernels=build.kernels if build else (),
        compiler=build.compiler if build else "-",
        ggml=build.ggml if build else "-",
        rounding=build.rounding if build else "-",
    )


def parse_cpuinfo(text: str) -> tuple[str, set[str]]:
    """Return model name and features of the first processor of ``/proc/cpuinfo``."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or fields.get("CPU implementer", "unknown")
    return name, set(fields.get("flags", fields.get("Features", "")).split())


def parse_nvidia(text: str) -> tuple[Gpu, ...]:
    """Read ``nvidia-smi --query-gpu=name,compute_cap,memory.total --format=csv,noheader,nounits``."""
    found = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 3 and re.fullmatch(r"\d+\.\d+", fields[1]) and fields[2].isdigit():
            found.append(Gpu(fields[0], f"sm_{fields[1].replace('.', '')}", int(fields[2]) << 20))
    return tuple(found)


def _linux_processor() -> tuple[str, set[str]]:
    source = Path("/proc/cpuinfo")
    return parse_cpuinfo(source.read_text()) if source.exists() else (platform.processor(), set())


def _apple_processor() -> tuple[str, set[str]]:
    names = _said("sysctl", "-n", "machdep.cpu.brand_string").strip()
    optional = dict(re.findall(r"hw\.optional\.(?:arm\.)?(\w+): (\d)", _said("sysctl", "hw.optional")))
    return names, {ours for theirs, ours in APPLE_FEATURES.items() if optional.get(theirs) == "1"}


def _apple_gpu() -> tuple[Gpu, ...]:
    return (Gpu("Apple", "apple", 0),) if platform.machine() == "arm64" else ()


def _nvidia_gpus() -> tuple[Gpu, ...]:
    query = "--query-gpu=name,compute_cap,memory.total"
    return parse_nvidia(_said("nvidia-smi", query, "--format=csv,noheader,nounits"))


def _said(*command: str) -> str:
    """Return what a program prints; nothing where it is absent or fails, as on a machine without a GPU."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout if done.returncode == 0 else ""


def _backend(gpus: tuple[Gpu, ...], libraries: Path | None) -> str:
    names = " ".join(path.name for path in libraries.glob("*ggml*")) if libraries else ""
    built = [backend for backend in BACKENDS if f"ggml-{backend}" in names]
    return built[0] if built and gpus else "cpu"


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None

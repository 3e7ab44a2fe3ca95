"""What this machine lacks for Tunemill, and how to get it.

Imports nothing but the standard library and runs on older Pythons than the rest, because it has
to work before anything is installed: ``python3 -m tunemill.doctor``.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

OLDEST_PYTHON = (3, 11)
DISK_NEEDED = 8e9  # bytes: the CPU environment takes 3 GB, the build of llama.cpp 1 GB, the demo 1 GB
MEMORY_NEEDED = 4e9  # bytes: the demo's training peaks below 2 GB, the compiler below 2 GB
PACKAGES = {
    "fetch, prepare": ("datasets", "datasketch", "huggingface_hub", "pyarrow", "torch", "transformers"),
    "train": ("accelerate", "bitsandbytes", "peft", "torch", "transformers", "trl"),
    "merge": ("numpy", "safetensors"),
    "convert": ("llama_cpp", "sentencepiece", "torch", "transformers"),
    "quantize": ("llama_cpp",),
    "infer": ("llama_cpp", "pyarrow"),
    "evaluate": ("jinja2", "krippendorff", "pyarrow", "scipy", "sklearn"),
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    state: str
    """``ok``, ``note`` (works without it) or ``missing``."""
    detail: str
    """What was found."""
    remedy: str = ""
    """What to do about it; empty when nothing is needed."""


def examine(directory: Path) -> list[Finding]:
    """Look at this machine; ``directory`` is where the environment and the store will lie."""
    findings = [python(), venv(), compiler(), make(), disk(directory), memory(), accelerator()]
    if importlib.util.find_spec("pydantic") is None:
        findings.append(Finding("tunemill", "note", "not installed yet", "make install"))
    else:
        findings += [stage_packages(stage, names) for stage, names in PACKAGES.items()]
    return findings


def python() -> Finding:
    """The interpreter's version."""
    version = platform.python_version()
    if sys.version_info[:2] >= OLDEST_PYTHON:
        return Finding("Python", "ok", version)
    return Finding("Python", "missing", version, "install Python 3.11 or newer and set PYTHON=python3.x")


def venv() -> Finding:
    """Whether virtual environments can be made (Debian packages ensurepip apart)."""
    if importlib.util.find_spec("ensurepip") is not None:
        return Finding("venv", "ok", "available")
    return Finding(
        "venv", "missing", "this Python cannot make one", "Debian, Ubuntu: apt-get install python3-venv"
    )


def compiler() -> Finding:
    """The C++ compiler that builds llama.cpp."""
    named = os.environ.get("CXX", "")
    for name in filter(None, (named, "c++", "g++", "clang++")):
        if found := shutil.which(name):
            return Finding("C++ compiler", "ok", found)
    remedy = "xcode-select --install" if sys.platform == "darwin" else "Debian, Ubuntu: apt-get install g++"
    return Finding("C++ compiler", "missing", "none of c++, g++, clang++ is on the PATH", remedy)


def make() -> Finding:
    """make itself; missing only when this module is run by hand."""
    if found := shutil.which("make"):
        return Finding("make", "ok", found)
    return Finding("make", "missing", "not on the PATH", "Debian, Ubuntu: apt-get install make")


def disk(directory: Path) -> Finding:
    """Free space where the environment will lie."""
    free = shutil.disk_usage(directory).free
    if free >= DISK_NEEDED:
        return Finding("disk", "ok", f"{free / 1e9:.0f} GB free")
    return Finding(
        "disk", "missing", f"{free / 1e9:.1f} GB free", f"free {DISK_NEEDED / 1e9:.0f} GB at {directory}"
    )


def memory() -> Finding:
    """Main memory."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size >= MEMORY_NEEDED:
        return Finding("memory", "ok", f"{size / 1e9:.0f} GB")
    return Finding(
        "memory", "note", f"{size / 1e9:.1f} GB", f"below {MEMORY_NEEDED / 1e9:.0f} GB the demo may swap"
    )


def accelerator() -> Finding:
    """The GPU, if there is one that training or inference can use."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return Finding("GPU", "ok", "Apple Metal")
    if shutil.which("nvidia-smi") is None:
        return Finding("GPU", "note", "none found", "the demo needs none; training a real model does")
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    if asked.returncode:
        reason = (asked.stdout + asked.stderr).strip().splitlines()
        return Finding("GPU", "note", reason[0] if reason else "nvidia-smi failed", "check the NVIDIA driver")
    return Finding("GPU", "ok", "; ".join(asked.stdout.strip().splitlines()))


def stage_packages(stage: str, names: tuple[str, ...]) -> Finding:
    """Whether a stage's libraries are installed; an image holds only its own stage's."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if not absent:
        return Finding(stage, "ok", "installed")
    extra = stage.split(", ")[-1]
    return Finding(
        stage, "note", f"without {', '.join(absent)}", f"pip install 'tunemill[{extra}]', or make install"
    )


def report(findings: list[Finding]) -> str:
    """One line for each finding, aligned."""
    width = max(len(finding.name) for finding in findings)
    marks = {"ok": "ok     ", "note": "note   ", "missing": "MISSING"}
    lines = []
    for finding in findings:
        remedy = f" -> {finding.remedy}" if finding.remedy else ""
        lines.append(f"{marks[finding.state]} {finding.name:<{width}}  {finding.detail}{remedy}")
    return "\n".join(lines)


def main() -> int:
    """Print the report; 78 (unfit configuration) when something needed is missing."""
    findings = examine(Path.cwd())
    sys.stdout.write(report(findings) + "\n")
    return 78 if any(finding.state == "missing" for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs foreign code in a child process with bounds, so that its failures stay its own.

llama.cpp ends a process with ``abort`` where it meets what it does not expect, and its converter
reads files that come from anywhere. Each runs in its own process group with limits on memory and
time, without network settings, credentials or the user's home, and dies with us.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunemill.errors import BadDataError, ConfigurationError, Stopped, TransientError

POLL_SECONDS = 0.1
KEPT_LOG = 64 << 10  # bytes of a log's end that are looked through for the reason of a failure
INHERITED = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "LLAMA_CPP_LIB_PATH",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "CUDA_VISIBLE_DEVICES",
)

FULL_DISK = re.compile(
    r"No space left on device|Disk quota exceeded|requested and \d+ written|iostream error"
)
"""What the system, NumPy's ``tofile`` and C++ streams say when a write is cut short."""

NO_MEMORY = re.compile(r"MemoryError|bad_alloc|can(?:'t|not) allocate memory", re.IGNORECASE)
"""What Python, C++, the system and its loader say when an allocation is refused."""

LAUNCH = """
import json, resource, runpy, sys
(parent, memory), target = json.loads(sys.argv[1]), sys.argv[2]
if sys.platform == "linux":
    import ctypes, os, signal
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("parent is gone")
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
sys.argv = sys.argv[2:]
if target.endswith(".py"):
    sys.path[0] = target.rpartition("/")[0]
    runpy.run_path(target, run_name="__main__")
else:
    runpy.run_module(target, run_name="__main__", alter_sys=True)
"""
"""Sets the limits from inside, because code between fork and exec is unsafe with threads.

RLIMIT_DATA counts private memory but not files mapped for reading, which RLIMIT_AS would. macOS has
neither limit in force. The second call is PR_SET_PDEATHSIG.
"""


@dataclass(frozen=True)
class Limits:
    """Bounds of one child."""

    seconds: float
    memory: int
    """Bytes."""


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    code: int
    """Exit status; negative for a signal."""
    log: str
    """The end of what it wrote to stdout and stderr."""


def machine_memory() -> int:
    """Return this machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def run(
    command: Sequence[str],
    directory: Path,
    limits: Limits,
    stop: threading.Event,
    tick: Callable[[], None] = lambda: None,
) -> Ended:
    """Run a Python script or module until it ends; ``tick`` is called now and then.

    ``command`` is a script's path or a module's name, and its arguments. ``directory`` is its working
    directory, home and place for the log.

    Raises:
        Stopped: ``stop`` was set.
        TransientError: it took longer than ``limits.seconds``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "log"
    isolated = ["-E"] if command[0].endswith(".py") else []  # a script must find its own modules first
    launch = [sys.executable, *isolated, "-s", "-B", "-W", "ignore", "-c", LAUNCH]
    launch.append(json.dumps([os.getpid(), limits.memory]))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*launch, *command],
            cwd=directory,
            env=_environment(directory, isolated=bool(isolated)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait(process, command[0], limits, stop, tick)
    finally:
        _kill_group(process)
    return Ended(process.returncode, read_end(log))


def _environment(directory: Path, isolated: bool) -> Mapping[str, str]:
    names = INHERITED if isolated else (*INHERITED, "PYTHONPATH")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"), "1")
    return kept | offline | {"HOME": str(directory), "HF_HOME": str(directory), "TMPDIR": str(directory)}


def _wait(
    process: subprocess.Popen[bytes],
    what: str,
    limits: Limits,
    stop: threading.Event,
    tick: Callable[[], None],
) -> None:
    deadline = time.monotonic() + limits.seconds
    while True:
        try:
            process.wait(POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            if stop.is_set():
                raise Stopped("stopped; run the same command again to go on") from None
            if time.monotonic() > deadline:
                raise TransientError(f"{Path(what).name} took longer than {limits.seconds:.0f} s") from None
            tick()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the child and all it started, if it is still there."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):  # it ended just now
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_end(log: Path) -> str:
    """Return the end of a log; control characters become spaces."""
    with log.open("rb") as source:
        source.seek(max(0, log.stat().st_size - KEPT_LOG))
        text = source.read().decode("utf-8", "replace").replace("\r", "\n")
    return re.sub(r"[^\S\n]+|[\x00-\x09\x0b-\x1f\x7f]", " ", text)


def fail(ended: Ended, subject: str, limits: Limits) -> None:
    """Turn a child's failure into one error line about ``subject``; return when it succeeded.

    Raises:
        TransientError: the disk is full, or it was killed.
        ConfigurationError: it lacks memory or a Python module.
        BadDataError: anything else it said.
    """
    if ended.code == 0:
        return
    reason = _reason(ended.log)
    if FULL_DISK.search(ended.log):
        raise TransientError(f"{subject}: no space left: free some space and run the same command again")
    if ended.code == -signal.SIGKILL:
        raise TransientError(f"{subject}: it was killed, as the system does when memory runs out")
    if NO_MEMORY.search(ended.log):
        raise ConfigurationError(f"{subject}: it needs more than {limits.memory / 1e9:.1f} GB of memory")
    if reason.startswith(("ModuleNotFoundError", "ImportError")):
        raise ConfigurationError(f"{subject}: {reason}: pip install 'tunemill[convert]'")
    if ended.code < 0:
        reason = f"{reason} (ended by {signal.Signals(-ended.code).name})"
    raise BadDataError(f"{subject}: {reason}")


def _reason(log: str) -> str:
    """Pick the line that says why: a Python exception's, else the last error, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    exceptions = [line for line in lines if re.match(r"\w*(\.\w+)*(Error|Exception|Interrupt)\b", line)]
    errors = [line for line in lines if re.search(r"\berror\b|GGML_ASSERT|failed", line, re.IGNORECASE)]
    chosen = (exceptions[-1:] or errors[-1:] or lines[-1:] or ["it said nothing"])[0]
    return chosen[:300]


def read_result(path: Path) -> Any:
    """Read the JSON a child of ours left.

    Raises:
        BadDataError: it left none.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadDataError(f"the child process left no result in {path.name}: {error}") from error

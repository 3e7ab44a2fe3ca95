"""Loads a GGUF once in a child process, because llama.cpp aborts on some damaged files.

Run as ``python -m tunemill.infer.probe FILE [LORA]``: exit status 0, or that of the error, with its line on
stdout. A crash of the child is the same finding for the file as a refusal.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tunemill.errors import BadDataError, ConfigurationError, TunemillError

SECONDS = 900  # a 70B model from a slow network disk


def check_loads(path: Path, lora: Path | None = None) -> None:
    """Prove that llama.cpp can load a file, and a LoRA for it, without ending the process.

    Raises:
        BadDataError: it refuses one, or crashes or hangs on it.
        ConfigurationError: it loads, but is no model that this stage can use.
    """
    command = [sys.executable, "-m", "tunemill.infer.probe", str(path), *([str(lora)] if lora else [])]
    try:
        child = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False, text=True)
    except subprocess.TimeoutExpired as error:
        raise BadDataError(f"llama.cpp did not finish loading {path.name} in {SECONDS} s") from error
    if child.returncode < 0:
        names = " or ".join(one.name for one in (path, lora) if one)
        raise BadDataError(
            f"{names} is damaged: llama.cpp crashes on it (signal {-child.returncode}); "
            "convert or pull it again"
        )
    if child.returncode:
        reason = (child.stdout.strip() or child.stderr.strip()).split("\n")[-1]
        unfit = child.returncode == ConfigurationError.exit_code
        raise (ConfigurationError if unfit else BadDataError)(reason)


def main() -> int:
    """Load the file named by the first argument, and a LoRA named by the second, on the CPU."""
    from tunemill.infer.model import Model

    try:
        paths = [Path(argument) for argument in sys.argv[1:]]
        Model(paths[0], gpu_layers=0, lora=paths[1] if paths[1:] else None).close()
    except TunemillError as error:
        sys.stdout.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

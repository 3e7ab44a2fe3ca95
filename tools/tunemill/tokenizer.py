"""Loads a model's tokenizer, after a child process with bounds has proved it harmless.

``tokenizer.json`` holds regular expressions and tables from a stranger. The library that reads it
panics on some, prints a backtrace, and can take minutes or all memory for others. So a child reads
it first and tokenizes texts that such expressions stumble over; it costs a quarter of a second. What
only a certain text of the task would set off is not found by it.

Run as ``python -m tunemill.tokenizer FILE``: exit status 0, or the reason on stderr.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tunemill.errors import BadDataError
from tunemill.files import MAX_TOKENIZER
from tunemill.rendering import INHERITED

SECONDS = 10  # of processor time; the largest vocabulary in use, Gemma's, takes under 2
MEMORY = 1200 << 20  # bytes; Gemma's takes a third of it
STUMBLING = [
    *(letter * 3000 for letter in "a 1.\n#"),
    *(letter * 300 + end for letter in ("a", "ab", " ", "1", "x.") for end in ("!", "\0", "b", "\n", "")),
    "naïve ☃ 😀 ﬁ 中文\t\u00a0 we'll 3.14159 {}[]()<|x|>",
]
"""Long runs of one thing, with and without an end that a repeated group did not expect."""


def load_tokenizer(directory: Path) -> Any:
    """Load a model's tokenizer by transformers, running none of its code.

    Raises:
        BadDataError: its files are missing, malformed, or take too much.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns of what it then raises
    if (directory / "tokenizer.json").exists():
        prove(directory / "tokenizer.json")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises bare Exception for what it cannot parse
        raise BadDataError(f"the tokenizer in {directory} cannot be loaded: {_line(str(error))}") from error


def prove(file: Path) -> None:
    """See in a child process that a ``tokenizer.json`` can be read and used within bounds.

    Raises:
        BadDataError: it cannot.
        ModuleNotFoundError: the library that reads it is not installed.
    """
    if file.stat().st_size > MAX_TOKENIZER:
        raise BadDataError(f"{file} is larger than {MAX_TOKENIZER >> 20} MiB: it is no tokenizer")
    kept = {name: os.environ[name] for name in INHERITED if name in os.environ}
    child = subprocess.run(
        [sys.executable, "-s", "-B", "-m", "tunemill.tokenizer", str(file)],
        env=kept | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "RUST_BACKTRACE": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        start_new_session=True,
        check=False,
    )
    if child.returncode == 0:
        return
    said = child.stderr.decode("utf-8", "replace")
    if "No module named 'tokenizers'" in said:
        raise ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers")
    reason = _line(said)
    if child.returncode == -signal.SIGPROF:
        reason = f"it takes more than {SECONDS} s for a few short texts"
    elif child.returncode < 0 or "memory" in said.lower():
        reason = f"it ends the program that reads it, or takes more than {MEMORY >> 20} MiB of memory"
    raise BadDataError(f"{file} is no usable tokenizer: {reason}")


def _line(said: str) -> str:
    """Pick the last line, in which Python names the exception."""
    return (said.strip().splitlines() or ["it gives no reason"])[-1][:200]


def main(file: str) -> None:
    """Read a tokenizer and tokenize what its expressions might stumble over."""
    import resource

    from tokenizers import Tokenizer

    if sys.platform == "linux":  # macOS enforces no limit on memory
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    tokenizer = Tokenizer.from_file(file)
    for text in STUMBLING:
        tokenizer.encode(text, add_special_tokens=False)


if __name__ == "__main__":
    main(sys.argv[1])

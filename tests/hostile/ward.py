"""Runs command lines, each in a fork of this process that has imported what they need.

A line of JSON in: arguments, directory and bounds. A line of JSON out: how it ended, with the most
memory that it or any of its own children held at once, which only the kernel knows.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from importlib import import_module

IMPORTED = (
    "numpy",
    "pyarrow.parquet",
    "boto3",
    "safetensors",
    "tokenizers",
    "transformers.models.llama.tokenization_llama",
    "transformers.models.auto.tokenization_auto",
    "tunemill.cli",
    "tunemill.commands.stages",
    "tunemill.store.publish",
    "tunemill.data.fetch",
    "tunemill.data.prepare",
    "tunemill.gguf.convert",
    "tunemill.merge.merge",
    "tunemill.infer.predict",
)
SIZE = 12 << 30  # of any file that a case could make grow


def run(arguments: list[str], directory: str) -> int:
    """Become the command line."""
    os.setsid()
    os.chdir(directory)
    os.environ |= {"HOME": f"{directory}/home", "TMPDIR": f"{directory}/tmp"}
    output = os.open("stdout", os.O_WRONLY | os.O_CREAT)
    errors = os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, SIZE))
    from tunemill import cli

    cli._talk_on_stderr()
    return cli.run(["--quiet", *arguments])


def wait(child: int, seconds: float) -> tuple[int, float, int]:
    """Return exit code, processor seconds and peak bytes, of it and its children; past the bound it ends."""
    begun = time.monotonic()
    ended = 0
    while not ended:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if time.monotonic() - begun > seconds and not ended:
            os.killpg(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10


def main() -> None:
    for name in IMPORTED:
        import_module(name)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        case = json.loads(line)
        child = os.fork()
        if not child:
            code = 70
            try:
                code = run(case["arguments"], case["directory"])
            finally:
                os._exit(code)
        code, seconds, peak = wait(child, case["seconds"])
        sys.stdout.write(json.dumps({"code": code, "seconds": seconds, "peak": peak}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

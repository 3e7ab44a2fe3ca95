"""How long ``tunemill --help`` takes, beside a bare Python interpreter in the same run.

    python tests/bench/bench_startup.py [--runs 20]

The two alternate, so that a slow moment of the machine hits both; medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "python -c 'import click'": [sys.executable, "-c", "import click"],
    "tunemill --help": [str(Path(sys.executable).with_name("tunemill")), "--help"],
    "tunemill train --help": [str(Path(sys.executable).with_name("tunemill")), "train", "--help"],
}


def seconds(command: list[str]) -> float:
    """Wall-clock seconds of one run of ``command``."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(runs + 1):
        for name, command in COMMANDS.items():
            taken = seconds(command)
            if number:  # the first round warms the page cache
                times[name].append(taken)
    bare = statistics.median(times["python -c pass"])
    print("| command | median ms | min ms | ratio to bare Python |")
    print("|---|---:|---:|---:|")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"| `{name}` | {median * 1e3:.0f} | {min(values) * 1e3:.0f} | {median / bare:.1f} |")


if __name__ == "__main__":
    main()

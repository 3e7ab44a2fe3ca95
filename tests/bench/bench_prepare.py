"""Time and peak memory of ``prepare``, in a process of its own, over texts of random words.

    python tests/bench/bench_prepare.py [--texts 1000] [--dimensions 46 | --labels 10] [--words 100]

Under ``--dimensions`` every text has a level on each of so many dimensions, as in the recipe flourishing;
under ``--labels`` one of so many labels. The tokenizer is made of the standard library's docstrings.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LEVELS = ("low", "medium", "high")
VOCABULARY = 20_000


def write_rows(path: Path, texts: int, words: int, columns: list[str], answers: tuple[str, ...]) -> None:
    """Write a table of random texts with an answer in every column."""
    chance = random.Random(1)
    known = [
        "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9)))
        for _ in range(VOCABULARY)
    ]
    with path.open("w", encoding="utf-8", newline="") as target:
        writer = csv.writer(target)
        writer.writerow(["id", "text", *columns])
        for number in range(texts):
            text = " ".join(chance.choices(known, k=words))
            writer.writerow([f"message-{number}", text, *chance.choices(answers, k=len(columns))])


def config(source: Path, dimensions: list[str], labels: tuple[str, ...]) -> dict[str, Any]:
    """Return the configuration: the shipped recipe's prompt where there are dimensions."""
    if not dimensions:
        return {"dataset_name": str(source), "labels": labels, "prompt": "One of {labels}.\n\n{text}"}
    import yaml

    from tunemill.recipe import RECIPES

    recipe = yaml.safe_load((RECIPES / "tasks/flourishing.yaml").read_text("utf-8"))
    named = dict(zip(dimensions, recipe["dimensions"].values(), strict=False))
    return {**recipe, "dataset_name": str(source), "dimensions": named}


def measured(folder: Path, dimensions: list[str], labels: tuple[str, ...]) -> None:
    """Run the stage over the folder's ``rows.csv``: what is measured."""
    from tunemill.data.config import PrepareConfig
    from tunemill.data.prepare import prepare
    from tunemill.progress import Progress
    from tunemill.work import Input, Work

    base = Input("base@sha256:0", "0", "base", folder / "base", facts={})
    settings = PrepareConfig(**config(folder / "rows.csv", dimensions, labels))
    work = Work(
        settings, {"base": base}, folder / "output", folder, Progress(io.StringIO()), checkpoints=None
    )
    work.output.mkdir()
    prepare(work)


def write_base(folder: Path) -> None:
    """Write what prepare needs of a base model: its tokenizer and chat template."""
    from tunemill.data.stdlib import docstrings
    from tunemill.data.tiny import write_tokenizer

    write_tokenizer(folder, [docstring.text for docstring in docstrings()], 4096)


def apart(work: Any, *arguments: Any) -> tuple[float, float]:
    """Run a function in a process of its own; return its seconds and its peak megabytes.

    The peak counts from this process's own size, which is why it imports nothing large.
    """
    started = time.perf_counter()
    child = os.fork()
    if not child:
        work(*arguments)
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"{work.__name__} failed")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return time.perf_counter() - started, usage.ru_maxrss * unit / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--words", type=int, default=100)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--dimensions", type=int, default=46, help="at most 46")
    kind.add_argument("--labels", type=int, default=0)
    given = parser.parse_args()
    labels = tuple(f"label {number}" for number in range(given.labels))
    dimensions = [] if labels else [f"dimension {number}" for number in range(given.dimensions)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_rows(path / "rows.csv", given.texts, given.words, dimensions or ["label"], labels or LEVELS)
        apart(write_base, path / "base")
        seconds, megabytes = apart(measured, path, dimensions, labels)
        size = sum(file.stat().st_size for file in (path / "output").iterdir()) / 1e6
    pairs = given.texts * max(1, len(dimensions))
    rows = f"{given.texts} texts, {pairs} rows"
    print(f"{rows}: {seconds:.0f} s, {megabytes:.0f} MB resident at most, {size:.0f} MB written")


if __name__ == "__main__":
    main()

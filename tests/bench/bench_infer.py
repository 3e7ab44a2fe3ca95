"""Classifying texts: our infer stage beside the published studies' loop and the fastest others, in one run.

    python tests/bench/bench_infer.py [--cap FOLDER] [--only short,cap,dimensions,growth] [--model 135m|1b]
        [--kinds F16,Q4_K_M] [--methods …] [--threads N] [--set key=value] [--folder FOLDER]

Every method is a process of its own over the same rows, token ids and threads; its seconds are those of
answering, without loading. The models are made first and kept in the folder. ``--cap`` is a folder with
the test.csv of Comparative Agendas texts; without it that workload is left out. A method that is not
installed (xllamacpp) is said so. A model with random weights never ends its answer, like a chat model that
explains itself; so the methods that generate are measured twice on one, up to the studies' 50 tokens, and
up to the tokens of the longest label, which is what a fine-tuned model writes at most.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import workloads

PEERS = Path(__file__).with_name("peers.py")
GENERATED = 50
"""Tokens that the studies let a model write at most."""
ROWS = {"short": 1000, "cap": 10, "dimensions": 4 * workloads.DIMENSIONS}
AT_ONCE = (1, 2, 4, 8, 0)
"""Texts computed at once in a context; 0 for as many as fit."""
MANY = (100, 1000, 10_000)
OURS: dict[str, dict[str, Any]] = {
    "tunemill": {},
    "tunemill, near": {"max_pruned": 0.01},
    "tunemill, label": {"max_pruned": 1, "decoding": "greedy"},
}
"""Settings of ours: exact probabilities, nearly exact ones, and the label alone, which is what peers give."""
METHODS = ("loop", "loop, cache", "reading", "llama-server", "xllamacpp", "transformers", *OURS)
"""``reading`` is the loop with a single token: what it takes to read the prompts, one after the other."""


def measure(method: str, case: dict[str, Any], folder: Path) -> dict[str, Any] | str:
    """Run one method in a process of its own; return what it took, or why it did not run."""
    if method == "xllamacpp" and find_spec("xllamacpp") is None:
        return "not installed: pip install xllamacpp"
    if method == "llama-server" and not case["server"]:
        return "not built: python -m tunemill.gguf.server"
    if method == "transformers" and case["kind"] != "F16":
        return "has no such type"
    if method in OURS:
        method, case = "tunemill", {**case, "settings": {**OURS[method], **case["settings"]}}
    if method == "reading":
        method, case = "loop", {**case, "max_tokens": 1}
    path = folder / "case.json"
    path.write_text(json.dumps(case))
    done = subprocess.run(
        [sys.executable, str(PEERS), method, str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}"
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def table(
    title: str, case: dict[str, Any], methods: Sequence[str], most: Sequence[int], folder: Path
) -> None:
    """Measure the methods on one case, and print a row for each as it is done."""
    print(f"\n{title}, {len(case['rows'])} rows, {_mean(case['rows']):.0f} tokens each\n")
    print("| method | rows/s | times loop | peak MB | labels | as the loop |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    slowest: float | None = None
    greedy: list[str | None] = []
    for method in methods:
        once = method in OURS or method == "reading"
        for tokens in most[:1] if once else most:
            name = method if once or len(most) == 1 else f"{method}, {tokens} tokens"
            found = measure(method, {**case, "max_tokens": tokens}, folder)
            if isinstance(found, str):
                print(f"| {name} | {found} | | | | |", flush=True)
                continue
            rate = len(case["rows"]) / found["seconds"]
            slowest = slowest or rate
            greedy = greedy or found["labels"]
            print(
                f"| {name} | {rate:.3g} | {rate / slowest:.1f} | {found['peak_mb']:.0f} | "
                f"{_valid(found['labels'])} | {_agreement(greedy, found['labels'])} |",
                flush=True,
            )


def growth(case: dict[str, Any], data: dict[int, Path], rows: Sequence[list[int]], folder: Path) -> None:
    """Print how the rate grows with the texts computed at once and with all texts, and if the bytes stay."""
    print("\nGrowth, ours on short texts\n")
    print("| | rows/s | whole seconds | peak MB | bytes | labels that differ |")
    print("|---|---:|---:|---:|---:|---:|")
    some = {**case, "rows": rows[: MANY[1]], "data": str(data[MANY[1]])}
    cases = [(f"n_parallel={size}", {**some, "settings": {"n_parallel": size}}) for size in AT_ONCE]
    cases += [(f"{many} texts", {**case, "rows": rows[:many], "data": str(data[many])}) for many in MANY]
    first: dict[int, dict[str, Any]] = {}
    for name, each in cases:
        found = measure("tunemill", {**each, "settings": {**case["settings"], **each["settings"]}}, folder)
        if isinstance(found, str):
            print(f"| {name} | {found} | | | | |", flush=True)
            continue
        count = len(each["rows"])
        before = first.setdefault(count, found)
        same = "the same" if found["sha256"] == before["sha256"] else "others"
        flips = sum(one != other for one, other in zip(before["labels"], found["labels"], strict=True))
        print(
            f"| {name} | {count / found['seconds']:.3g} | {found['whole']:.1f} | {found['peak_mb']:.0f} | "
            f"{same} | {flips} |",
            flush=True,
        )


def _mean(rows: Sequence[Sequence[int]]) -> float:
    return sum(map(len, rows)) / len(rows)


def _valid(labels: Sequence[str | None]) -> str:
    return f"{sum(label is not None for label in labels) / len(labels):.1%}"


def _agreement(greedy: Sequence[str | None], labels: Sequence[str | None]) -> str:
    """The share of rows with the loop's label, among those where the loop wrote a label."""
    valid = [place for place, label in enumerate(greedy) if label is not None]
    return f"{sum(labels[n] == greedy[n] for n in valid) / len(valid):.2%}" if valid else "-"


def _case(
    made: workloads.Made, kind: str, work: workloads.Workload, chosen: argparse.Namespace
) -> dict[str, Any]:
    gguf = made.gguf(kind)
    found = workloads.prompts(gguf, work)
    longest = max(map(len, found["rows"])) + GENERATED
    return {
        **found,
        "kind": kind,
        "gguf": str(next(gguf.glob("*.gguf"))),
        "folder": str(made.folder),
        "data": str(work.save(chosen.folder)),
        "context": -(-longest // 256) * 256,
        "threads": chosen.threads,
        "server": _server(),
        "settings": dict(pair.split("=", 1) for pair in chosen.set),
        "max_tokens": GENERATED,
    }


def _server() -> str:
    """The llama.cpp server of this environment, or nothing."""
    from tunemill.errors import ConfigurationError
    from tunemill.gguf.server import find_server

    try:
        return str(find_server())
    except ConfigurationError:
        return ""


def _workloads(chosen: argparse.Namespace) -> Iterator[tuple[str, workloads.Workload]]:
    """Yield the workloads to compare, with the model for each."""
    if "short" in chosen.only:
        work = workloads.short_texts(chosen.rows or ROWS["short"])
        yield "tiny-trained", work
        yield "tiny", work
    if "cap" in chosen.only and chosen.cap:
        yield chosen.model, workloads.cap(chosen.cap, chosen.rows or ROWS["cap"])
    if "dimensions" in chosen.only:
        yield "tiny", workloads.dimensions((chosen.rows or ROWS["dimensions"]) // workloads.DIMENSIONS)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cap", type=Path, help="folder with the test.csv of CAP texts")
    parser.add_argument("--only", default="short,cap,dimensions,growth", type=lambda text: text.split(","))
    parser.add_argument("--model", default="135m", choices=("135m", "1b"), help="which model for CAP")
    parser.add_argument("--kinds", default="F16,Q4_K_M", type=lambda text: text.split(","))
    parser.add_argument("--methods", default="/".join(METHODS), type=lambda text: text.split("/"))
    parser.add_argument("--threads", default=os.cpu_count() or 1, type=int)
    parser.add_argument("--rows", default=0, type=int, help="rows of each workload instead of the usual")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of ours")
    parser.add_argument("--folder", default=Path(".tunemill/bench"), type=Path, help="where models are kept")
    return parser.parse_args()


def main() -> None:
    chosen = _arguments()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    print(f"{chosen.threads} threads, load {os.getloadavg()[0]:.1f}")
    for model, work in _workloads(chosen):
        made = workloads.make_model(chosen.folder, model, chosen.kinds)
        for kind in chosen.kinds:
            case = _case(made, kind, work, chosen)
            most = (GENERATED,) if "trained" in model else (GENERATED, case["answer_tokens"])
            table(f"{work.name}, {model}, {kind}", case, chosen.methods, most, chosen.folder)
    if "growth" in chosen.only:
        made = workloads.make_model(chosen.folder, "tiny-trained", chosen.kinds)
        data = {many: workloads.short_texts(many).save(chosen.folder) for many in MANY}
        case = _case(made, chosen.kinds[-1], workloads.short_texts(MANY[-1]), chosen)
        growth(case, data, case["rows"], chosen.folder)
    print(f"\n{time.monotonic() - begun:.0f} s in all, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()

"""Our merge beside PEFT's load-merge-save and cp, on a Llama shape with random weights, in one run.

    python tests/bench/bench_merge.py [--shape 1b|3b] [--rank 16] [--rounds 3] [--memory-at 3b] [--folder …]

Each method is a whole process, started new, that takes its turn in every round; the best round counts
and the peak memory is the largest of all rounds. The base is read from the page cache where it fits,
and everything is synced between turns, so programs are compared rather than disks. The result of the
last round is compared with PEFT's, number for number. A process inherits the peak memory of the one
that starts it, so about 50 MB are this program's own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tunemill.weights import read_headers

SHAPES = {
    # vocabulary, hidden, intermediate, layers, heads, key-value heads: Llama 3.2's
    "1b": (128256, 2048, 8192, 16, 32, 8),
    "3b": (128256, 3072, 8192, 28, 24, 8),
    "tiny": (1024, 256, 512, 2, 4, 2),
}
LINEAR = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
OURS = """
import sys
from pathlib import Path
from tunemill.merge.config import MergeConfig
from tunemill.merge.merge import merge
from tunemill.progress import Progress
from tunemill.work import Input, Work
base, adapter, output = map(Path, sys.argv[1:])
output.mkdir()
inputs = {role: Input(role, "", role, path, {}) for role, path in (("base", base), ("adapter", adapter))}
merge(Work(MergeConfig(), inputs, output, output, Progress(quiet=True), None))
"""
PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
"""


def matrices(shape: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and (rows, columns) of every linear layer."""
    _, hidden, inner, layers, heads, pairs = SHAPES[shape]
    narrow = hidden // heads * pairs
    rows = {"k_proj": narrow, "v_proj": narrow, "gate_proj": inner, "up_proj": inner}
    for layer in range(layers):
        for block, names in LINEAR.items():
            for name in names:
                columns = inner if name == "down_proj" else hidden
                yield f"model.layers.{layer}.{block}.{name}", (rows.get(name, hidden), columns)


def tensors(shape: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the base; input and output embeddings are one."""
    vocabulary, hidden, _, layers, _, _ = SHAPES[shape]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", (hidden,)
    for name, size in matrices(shape):
        yield f"{name}.weight", size


def apart(function: Callable[..., None], *arguments: object) -> None:
    """Call a function in a process of its own, so that its memory is not inherited by what is measured."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{function.__name__} failed")


def make_base(folder: Path, shape: str) -> None:
    """Write a base with random bfloat16 weights."""
    vocabulary, hidden, inner, layers, heads, pairs = SHAPES[shape]
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": pairs,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    entries, offset = {}, 0
    for name, size in tensors(shape):
        bytes_ = 2 * int(np.prod(size))
        entries[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, offset + bytes_]}
        offset += bytes_
    text = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
    chance = np.random.default_rng(1)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, offset // 2, 1 << 24):
            numbers = chance.standard_normal(min(1 << 24, offset // 2 - start), np.float32) * np.float32(0.02)
            file.write((numbers.view("<u4") >> 16).astype("<u2"))


def make_adapter(folder: Path, shape: str, rank: int) -> None:
    """Write a LoRA over all linear layers, with both halves random."""
    from safetensors.numpy import save_file

    folder.mkdir()
    names = [name for block in LINEAR.values() for name in block]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": names}))
    chance = np.random.default_rng(2)
    halves = {}
    for name, (rows, columns) in matrices(shape):
        for half, size in (("A", (rank, columns)), ("B", (rows, rank))):
            key = f"base_model.model.{name}.lora_{half}.weight"
            halves[key] = chance.standard_normal(size, np.float32) * np.float32(0.02)
    save_file(halves, folder / "adapter_model.safetensors")


def measure(command: list[str]) -> tuple[float, float, float]:
    """Run a command; return its seconds by the clock and of processor time, and its peak megabytes."""
    os.sync()
    started = time.perf_counter()
    child = os.posix_spawnp(command[0], command, os.environ | {"HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{command[0]} failed with status {status}")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 1e6


def difference(folders: list[Path]) -> tuple[float, float]:
    """Compare two merged models; ``folders`` are ours, PEFT's and the base.

    Return the share of numbers that differ, and the largest difference in units of the last place of the
    largest of the three numbers: where base and change nearly cancel, both engines' rounding shows.
    """
    headers = [read_headers(folder)[0] for folder in folders]
    total, differing, worst = 0, 0, 0.0
    for name, tensor in headers[0].tensors.items():
        ours, peft, base = (
            (
                np.fromfile(h.path, "<u2", tensor.size // 2, offset=h.tensors[name].start).astype("<u4") << 16
            ).view("<f4")
            for h in headers
        )
        apart = np.abs(ours - peft)
        largest = np.maximum.reduce([np.abs(ours), np.abs(peft), np.abs(base)])
        unit = np.exp2(np.floor(np.log2(np.maximum(largest, 1e-30))) - 7)  # a bfloat16 has 8 significant bits
        total, differing = total + apart.size, differing + np.count_nonzero(apart)
        worst = max(worst, float((apart / unit).max()))
    return differing / total, worst


def memory_at(folder: Path, shape: str, rank: int) -> float:
    """Return the peak megabytes of our merge of another shape, in the room that the first one took."""
    for left in folder.iterdir():
        shutil.rmtree(left)
    apart(make_base, folder / "base", shape)
    apart(make_adapter, folder / "adapter", shape, rank)
    places = [str(folder / name) for name in ("base", "adapter", "Tunemill")]
    return measure([sys.executable, "-c", OURS, *places])[2]


def report(size: int, results: dict[str, list[tuple[float, float, float]]]) -> None:
    best = {name: min(seconds for seconds, _, _ in runs) for name, runs in results.items()}
    print(f"{size / 2e9:.2f} B parameters, {size / 1e9:.2f} GB of bfloat16, {os.cpu_count()} cores\n")
    print("| method | best s | all rounds s | least CPU s | peak MB resident | times cp | times PEFT |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for name, runs in results.items():
        rounds = " ".join(f"{seconds:.2f}" for seconds, _, _ in runs)
        processor, peak = min(cpu for _, cpu, _ in runs), max(memory for _, _, memory in runs)
        print(
            f"| {name} | {best[name]:.2f} | {rounds} | {processor:.2f} | {peak:.0f} "
            f"| {best[name] / best['cp']:.2f} | {best[name] / best['PEFT']:.3f} |"
        )


def goals(
    shape: str, results: dict[str, list[tuple[float, float, float]]], larger: str | None, peak: float
) -> None:
    """Print what the merge is to reach, and what it does."""
    best = {name: min(seconds for seconds, _, _ in runs) for name, runs in results.items()}
    own = max(memory for _, _, memory in results["Tunemill"])
    print("\n| goal | reached |\n|---|---:|")
    print(f"| at most 1.5 times cp | {best['Tunemill'] / best['cp']:.2f} |")
    print(f"| at least 5 times as fast as PEFT | {best['PEFT'] / best['Tunemill']:.1f} |")
    print(f"| at most 1000 MB resident, {shape} | {own:.0f} |")
    if larger:
        print(f"| the same, {larger} | {peak:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-at", choices=SHAPES, help="a larger shape that is merged too, once")
    parser.add_argument("--folder", type=Path, help="where there is room for four models")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        base, adapter = folder / "base", folder / "adapter"
        apart(make_base, base, options.shape)
        apart(make_adapter, adapter, options.shape, options.rank)
        commands = {
            "cp": ["cp", "-r", str(base), str(folder / "cp")],
            "Tunemill": [sys.executable, "-c", OURS, str(base), str(adapter), str(folder / "Tunemill")],
            "PEFT": [
                sys.executable,
                "-W",
                "ignore",
                "-c",
                PEFT,
                str(base),
                str(adapter),
                str(folder / "PEFT"),
            ],
        }
        results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                shutil.rmtree(folder / name, ignore_errors=True)
                results[name].append(measure(command))
            shutil.rmtree(folder / "cp")  # leaves its pages to the cache of the others
        report((base / "model.safetensors").stat().st_size, results)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # apart, for its memory
            share, worst = pool.apply(difference, [[folder / "Tunemill", folder / "PEFT", base]])
        peak = memory_at(folder, options.memory_at, options.rank) if options.memory_at else 0.0
        goals(options.shape, results, options.memory_at, peak)
        print(f"\n{share:.4%} of the numbers differ from PEFT's, by at most {worst:.2g} in the last place.")


if __name__ == "__main__":
    main()

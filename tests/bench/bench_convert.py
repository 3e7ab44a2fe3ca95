"""Our convert stage beside llama.cpp's own script, on a Llama shape with random weights, in one run.

    python tests/bench/bench_convert.py [--layers 12] [--outtype f16] [--rounds 3] [--folder FOLDER]

Each is a whole process, started new, that takes its turn in every round; the best round counts. The
model is read from the page cache where it fits, and everything is synced between turns. What the stage
does besides the script (reading headers, comparing tokens, proving the file) is listed by step, taken
from one more run under the profiler.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import os
import pstats
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = ("read_headers", "expect_tokens", "_run", "check_tokens", "prove_conversion", "write_origin")
OURS = """
import sys
from pathlib import Path
from tunemill.gguf.config import ConvertConfig
from tunemill.gguf.convert import convert
from tunemill.progress import Progress
from tunemill.work import Input, Work
model, data, output, outtype = sys.argv[1:]
inputs = {role: Input(f"t/{role}@sha256:0", "", role, Path(path), {}) for role, path in
          (("merged", model), ("data", data))}
root = Path(output)
(root / "out").mkdir(parents=True)
config = ConvertConfig(outtype=outtype)
convert(Work(config, inputs, root / "out", root / "scratch", Progress(quiet=True), None))
"""


def make(folder: Path, layers: int) -> None:
    """A Llama of about 240 M parameters at 12 layers, with a SentencePiece tokenizer, and 400 rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import sentencepiece
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model, data = folder / "model", folder / "data"
    for directory in (model, data):
        directory.mkdir(parents=True)
    chance = random.Random(1)
    words = [
        "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(3000)
    ]
    texts = [" ".join(chance.choices(words, k=40)) for _ in range(400)]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=trained, vocab_size=8000, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=False, pad_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (model / "tokenizer.model").write_bytes(trained.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    settings |= {"legacy": False, "add_bos_token": True, "add_prefix_space": False}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    size = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue()).vocab_size()
    shape = LlamaConfig(
        vocab_size=size, hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=4, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(1)
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(model)
    rows = [{"prompt": [{"role": "user", "content": t}], "completion": "A", "text": t} for t in texts]
    pq.write_table(pa.Table.from_pylist(rows), data / "train.parquet")


def bare(folder: Path, target: Path, outtype: str) -> list[str]:
    """The script as one would call it."""
    from tunemill.gguf.source import find_source

    script = find_source().directory / "convert_hf_to_gguf.py"
    target.mkdir(parents=True)
    words = [str(folder / "model"), "--outfile", str(target / "model.gguf"), "--outtype", outtype]
    return [sys.executable, str(script), *words]


def ours(folder: Path, target: Path, outtype: str) -> list[str]:
    """The stage's work without a store."""
    return [sys.executable, "-c", OURS, str(folder / "model"), str(folder / "data"), str(target), outtype]


def profile(folder: Path, target: Path, outtype: str) -> dict[str, float]:
    """Seconds within each step, in this process."""
    source = ours(folder, target, outtype)
    watched, saved = cProfile.Profile(), sys.argv
    sys.argv = ["-c", *source[3:]]
    try:
        scope: dict[str, object] = {}
        watched.runctx(OURS, scope, scope)
    finally:
        sys.argv = saved
    found = pstats.Stats(watched).stats
    return {name: entry[3] for (_, _, name), entry in found.items() if name in STEPS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--outtype", default="f16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as temporary:
        folder = Path(temporary)
        make(folder, chosen.layers)
        size = (folder / "model/model.safetensors").stat().st_size
        print(f"{size / 1e6:.0f} MB to {chosen.outtype}, {os.cpu_count()} cores")
        best: dict[str, float] = {}
        for _ in range(chosen.rounds):
            for name, method in (("llama.cpp's script", bare), ("convert", ours)):
                target = folder / "target"
                command = method(folder, target, chosen.outtype)
                os.sync()
                begun = time.monotonic()
                subprocess.run(command, check=True, capture_output=True)
                best[name] = min(best.get(name, float("inf")), time.monotonic() - begun)
                shutil.rmtree(target)
        for name, seconds in best.items():
            print(f"{name:20} {seconds:6.1f} s")
        for name, seconds in sorted(profile(folder, folder / "target", chosen.outtype).items()):
            print(f"  of it {name:16} {seconds:6.1f} s")


if __name__ == "__main__":
    main()

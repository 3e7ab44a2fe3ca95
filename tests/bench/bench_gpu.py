"""Training speed on a GPU: our train stage's loop, bare TRL, and a plain PyTorch loop, in one run.

    python tests/bench/bench_gpu.py [--seconds 450] [--shapes 1b 8b] [--methods lora qlora]

Llama shapes with random weights, so nothing is downloaded. Each measurement is a process of its
own, so that its peak memory is its own. Utilisation is model FLOPs (4 per weight and token of a
frozen base, 6 per trained weight, plus attention; what checkpointing recomputes is not counted) over the
rate of a large bfloat16 matrix product measured in the same run. What a machine lacks is
skipped with the reason; without a GPU everything is, and the exit code is 0.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    # hidden, intermediate, layers, heads, key-value heads, vocabulary, batch, tokens a row
    "1b": (2048, 8192, 16, 32, 8, 128_256, 8, 1024),
    "8b": (4096, 14_336, 32, 32, 8, 128_256, 4, 1024),
    "micro": (64, 128, 2, 2, 2, 512, 2, 32),
}
LOOPS = {
    "tunemill": ("trl", "datasets", "pydantic"),
    "trl": ("trl", "datasets"),
    "plain": (),
}
"""Each loop with the packages that it needs beside torch, transformers and peft."""
NEEDED = {"lora": (), "qlora": ("bitsandbytes",)}
WARM, STEPS = 3, 10  # the first steps compile kernels and grow the memory pools
RANK = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=450, help="start nothing new after this long")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1b", "8b"])
    parser.add_argument("--methods", nargs="+", choices=NEEDED, default=["lora", "qlora"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the script")
    parser.add_argument("--case", help="used by the script itself")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(**json.loads(options.case))))
        return 0
    lacking = unfit(options.device)
    if lacking:
        print(f"skipped: {lacking}")
        return 0
    compare(options)
    return 0


def unfit(device: str) -> str | None:
    """Why nothing can be measured here, or None."""
    missing = [name for name in ("torch", "transformers", "peft") if not present(name)]
    if missing:
        return f"{', '.join(missing)} not installed"
    import torch

    return "no GPU that PyTorch can use" if device == "cuda" and not torch.cuda.is_available() else None


def present(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def compare(options: argparse.Namespace) -> None:
    """Print the table, a row as soon as it is measured."""
    deadline = time.monotonic() + options.seconds
    rate = product_rate(options.device)
    print(f"{device_name(options.device)}; a bfloat16 matrix product runs at {rate / 1e12:.1f} TFLOP/s\n")
    print("| shape | method | loop | tokens/s | step ms | peak memory | utilisation |")
    print("|---|---|---|---:|---:|---:|---:|", flush=True)
    for shape in options.shapes:
        for method in options.methods:
            for loop, packages in LOOPS.items():
                missing = [name for name in (*packages, *NEEDED[method]) if not present(name)]
                reason = f"{', '.join(missing)} not installed" if missing else None
                case = {"shape": shape, "method": method, "loop": loop, "device": options.device}
                print(row(case, rate, deadline, reason), flush=True)


def row(case: dict[str, str], rate: float, deadline: float, reason: str | None) -> str:
    """Measure one case in a child and return its line of the table."""
    start = f"| {case['shape']} | {case['method']} | {case['loop']} "
    left = deadline - time.monotonic()
    if reason is None and left < 20:
        reason = "no time left"
    if reason is not None:
        return f"{start}| skipped: {reason} | | | |"
    command = [sys.executable, str(Path(__file__).resolve()), "--case", json.dumps(case)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left + 30, check=False)
    except subprocess.TimeoutExpired:
        return f"{start}| skipped: took too long | | | |"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"{start}| failed: {last[:120]} | | | |"
    found = json.loads(done.stdout.strip().splitlines()[-1])
    used = found["flops_per_token"] * found["tokens_per_second"] / rate
    return (
        f"{start}| {found['tokens_per_second']:,.0f} | {found['step_seconds'] * 1e3:.0f} "
        f"| {found['peak_memory'] / 1e9:.1f} GB | {used:.0%} |"
    )


def product_rate(device: str) -> float:
    """FLOP/s of a square bfloat16 product of random matrices, the best of five."""
    import torch

    size = 8192 if device == "cuda" else 512
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        wait(device)
        started = time.perf_counter()
        left @ right
        wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def device_name(device: str) -> str:
    """The GPU's name, or that there is none."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "CPU (no measurement)"


def wait(device: str) -> None:
    """Wait until the device has done what it was told."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def measure(shape: str, method: str, loop: str, device: str) -> dict[str, float]:
    """Train some steps and return tokens/s, seconds a step, peak memory and FLOPs a token."""
    import torch

    torch.manual_seed(0)
    model = build(shape, method, device)
    frozen = sum(elements(parameter) for parameter in model.parameters())
    times = {"plain": plain_loop, "trl": trl_loop, "tunemill": tunemill_loop}[loop](model, shape, device)
    hidden, _, layers, *_, batch, length = SHAPES[shape]
    seconds = sorted(times)[len(times) // 2]
    trained = 2 * RANK * hidden * 7 * layers  # about; a thousandth of the whole
    attention = (
        6 * layers * hidden * length
    )  # causal: half of 12 per token, for two products and their backward
    return {
        "tokens_per_second": batch * length / seconds,
        "step_seconds": seconds,
        "peak_memory": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
        "flops_per_token": 4 * frozen + 6 * trained + attention,
    }


def build(shape: str, method: str, device: str) -> Any:
    """Return a Llama with random weights, in bfloat16 or in 4 bits, made where it will run."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, kv_heads, vocabulary, _, length = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=length,
        tie_word_embeddings=shape == "1b",
        use_cache=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if method == "qlora":
        to_four_bits(model, device)
    return model


def to_four_bits(model: Any, device: str) -> None:
    """Replace every linear layer but the head by bitsandbytes' NF4 with double quantization."""
    import bitsandbytes
    import torch

    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or name == "lm_head":
            continue
        small = bitsandbytes.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
        )
        weight = module.weight.data.cpu()
        small.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, small)
    model.is_loaded_in_4bit = True


def elements(parameter: Any) -> int:
    """Weights of a parameter; a 4-bit one packs two into a byte."""
    return parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)


def adapter() -> Any:
    """The LoRA configuration of every loop."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")


def rows(shape: str) -> list[list[int]]:
    """Random token ids for every step, the same in each loop."""
    import torch

    *_, vocabulary, batch, length = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)
    count = batch * (WARM + STEPS)
    found: list[list[int]] = torch.randint(3, vocabulary, (count, length), generator=generator).tolist()
    return found


def plain_loop(model: Any, shape: str, device: str) -> list[float]:
    """transformers and PEFT under a loop of a few lines: what the libraries below TRL give."""
    import torch
    from peft import get_peft_model

    model = get_peft_model(model, adapter())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    batch = SHAPES[shape][-2]
    data = torch.tensor(rows(shape), device=device)
    times = []
    for step in range(WARM + STEPS):
        wait(device)
        started = time.perf_counter()
        ids = data[step * batch : (step + 1) * batch]
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wait(device)
        times.append(time.perf_counter() - started)
    return times[WARM:]


def trl_loop(model: Any, shape: str, device: str) -> list[float]:
    """TRL's SFTTrainer as its documentation uses it."""
    from trl import SFTTrainer

    return trainer_loop(SFTTrainer, model, shape, device)


def tunemill_loop(model: Any, shape: str, device: str) -> list[float]:
    """The trainer of the train stage, which records each step."""
    from tunemill.train.trainer import Trainer

    return trainer_loop(Trainer, model, shape, device)


def trainer_loop(kind: Any, model: Any, shape: str, device: str) -> list[float]:
    """Train with a Trainer class; the clock is a callback at the end of each step."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait(device)
            ends.append(time.perf_counter())
            if hasattr(trainer, "finish_row"):
                trainer.finish_row()

    data = rows(shape)
    with tempfile.TemporaryDirectory() as directory:
        arguments = SFTConfig(
            output_dir=directory,
            per_device_train_batch_size=SHAPES[shape][-2],
            max_steps=WARM + STEPS,
            max_length=None,
            learning_rate=1e-4,
            bf16=True,
            use_cpu=device == "cpu",
            gradient_checkpointing=True,
            dataloader_pin_memory=device == "cuda",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = kind(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": data}),
            processing_class=words(shape),
            peft_config=adapter(),
            callbacks=[Clock()],
        )
        trainer.train()
    return [after - before for before, after in itertools.pairwise(ends)][WARM - 1 :]


def words(shape: str) -> Any:
    """A tokenizer, which the trainers ask for and never use: the rows are ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


if __name__ == "__main__":
    sys.exit(main())

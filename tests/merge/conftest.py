"""Tiny models with random weights, adapters of every supported kind, and PEFT's own merge of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tunemill.merge.config import MergeConfig
from tunemill.progress import Progress
from tunemill.work import Input, Work


class NoCheckpoints:
    def latest(self, destination):
        return None

    def save(self, directory, step):
        raise AssertionError("merge saves no checkpoints")


@pytest.fixture
def work(tmp_path):
    """Build the Work of a merge from directories and the adapter's facts."""

    def build(base: Path, adapter: Path, facts=None, **config) -> Work[MergeConfig]:
        output = tmp_path / "out"
        output.mkdir()
        inputs = {
            "base": Input("base/tiny@sha256:" + "b" * 64, "c" * 64, "base", base, {}),
            "adapter": Input("t/adapter@sha256:" + "a" * 64, "d" * 64, "adapter", adapter, facts or {}),
        }
        return Work(MergeConfig(**config), inputs, output, tmp_path, Progress(quiet=True), NoCheckpoints())

    return build


def tiny_llama(directory: Path, dtype: str, tied: bool = False, shard: str = "5GB") -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(directory, max_shard_size=shard)
    (directory / "tokenizer_config.json").write_text('{"from": "base"}')
    (directory / "LICENSE").write_text("theirs")
    return directory


def tiny(architecture: str, directory: Path, dtype: str, **more) -> Path:
    """Save a tiny model with random weights of any architecture that transformers knows."""
    import torch
    import transformers

    torch.manual_seed(5)
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    if architecture == "GPT2":
        shape = {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
        heads = {"bos_token_id": 0, "eos_token_id": 0}
    config = getattr(transformers, f"{architecture}Config")(**(shape | heads | more))
    model = getattr(transformers, TINY.get(architecture, f"{architecture}ForCausalLM"))(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms would all be zeros or ones
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(0, 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return directory


TINY = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


def random_adapter(model, directory: Path, seed: int = 11, **settings) -> Path:
    """Save an adapter whose B is not zero, so that merging it changes something."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.normal_(0, 0.1)
            elif parameter.requires_grad:  # modules_to_save, biases, tokens
                parameter.add_(torch.randn_like(parameter) * 0.05)
    peft_model.save_pretrained(directory)
    (directory / "prompting.json").write_text('{"from": "adapter"}')
    return directory


@pytest.fixture
def models():
    return SimpleNamespace(
        tiny=tiny, tiny_llama=tiny_llama, random_adapter=random_adapter, load=load, read=read, compare=compare
    )


def load(base: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype="auto")


def read(directory: Path) -> dict:
    """All tensors of a model directory, through the index when there is one."""
    from safetensors.torch import load_file

    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return load_file(directory / "model.safetensors")
    files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {name: tensor for file in files for name, tensor in load_file(directory / file).items()}


ULPS = {"float32": 2**-22, "bfloat16": 2**-7, "float16": 2**-10}
"""One unit in the last place, relative; float32's is doubled for the order of the additions."""


def compare(ours: dict, theirs: dict, before: dict, dtype: str) -> int:
    """Assert that two merges agree within one rounding; return how many tensors the merge changed.

    Where base and change nearly cancel, the rounding of the larger of them shows.
    """
    assert ours.keys() == theirs.keys()
    changed = 0
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.shape == theirs[name].shape, name
        a, b = tensor.double().numpy(), theirs[name].double().numpy()
        base = before[name].double().numpy() if name in before else np.zeros_like(a)
        if base.shape != a.shape:  # new tokens
            base = np.concatenate([base, np.zeros((len(a) - len(base), *a.shape[1:]))])
        limit = ULPS[dtype] * np.maximum.reduce([np.abs(a), np.abs(b), np.abs(a - base)]) + 1e-7
        assert (np.abs(a - b) <= limit).all(), f"{name}: {np.abs(a - b).max()} at most {limit.max()}"
        changed += not np.array_equal(a, base)
    return changed

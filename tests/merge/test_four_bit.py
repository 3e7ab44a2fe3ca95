"""The base of a QLoRA adapter: what 4 bits leave of it, as bitsandbytes computes it, and which is taken."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tunemill.errors import BadDataError
from tunemill.merge import merge as merging
from tunemill.merge.four_bit import DENSE, FourBit
from tunemill.merge.merge import merge
from tunemill.merge.numbers import Space
from tunemill.parity.probes import Probe, Probes, Text
from tunemill.weights import read_header

NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ARCHITECTURES = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3",
    "gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3Text", "smollm3": "SmolLM3",
}  # fmt: skip
FACTS = {
    "method": "qlora",
    "dtype": "float32",
    "quantization": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "pad_token_id": 0}
"""bitsandbytes on a CPU unpacks no rows that end within a block."""
SETTINGS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("float32", (300, 1024)), ("bfloat16", (64, 128)), ("float16", (7, 30)), ("float32", (129, 64))],
)
def test_equals_bitsandbytes(tmp_path, dtype, shape, kind, double):
    """But for one in a hundred of the blocks, which lie between two of double quantization's levels.

    There bitsandbytes on a CPU looks the level up in a table, and its blocks differ by that one level.
    """
    import torch
    from bitsandbytes import functional
    from safetensors.torch import save_file

    torch.manual_seed(4)
    weight = (torch.randn(shape) * 0.05).to(getattr(torch, dtype))
    weight[0, :5] = 0
    save_file({"w": weight}, tmp_path / "w.safetensors")
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=double, quant_type=kind
    )
    theirs = functional.dequantize_4bit(packed, state).float().numpy().reshape(-1)
    four_bit = FourBit(kind, double, NAMES[dtype])
    tensor = read_header(tmp_path / "w.safetensors").tensors["w"]
    with (tmp_path / "w.safetensors").open("rb") as file:
        scales = four_bit.scales(file.fileno(), tensor)
    space = Space(weight.numel())
    space.values[:] = weight.float().numpy().reshape(-1)
    four_bit.apply(space.values, 0, scales, space)
    step = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    same = np.abs(space.values - theirs) <= step * np.abs(theirs) + 1e-9
    assert same.mean() > (0.99 if double else 0.99999)
    assert (np.abs(space.values - theirs) <= step * np.abs(theirs) + 0.02 * np.ptp(scales[0])).all()
    assert np.abs(space.values - weight.float().numpy().reshape(-1)).max() < 0.2 * scales[0].max()


def in_four_bits(base, dtype="float32"):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kind = getattr(torch, dtype)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=kind,
    )
    return AutoModelForCausalLM.from_pretrained(
        base, quantization_config=settings, dtype=kind, device_map={"": "cpu"}
    )


@pytest.mark.parametrize("model_type", DENSE)
def test_the_tensors_that_training_held(tmp_path, models, work, model_type):
    """Those that transformers quantizes, and no other."""
    from bitsandbytes import functional

    base = models.tiny(ARCHITECTURES[model_type], tmp_path / "base", "float32", **WIDE)
    assert json.loads((base / "config.json").read_text())["model_type"] == model_type
    adapter = models.random_adapter(models.load(base), tmp_path / "adapter", r=2, target_modules=["k_proj"])
    facts = merge(work(base, adapter, FACTS, qlora_base="nf4"))
    assert facts["base_used"] == "nf4"
    ours, before = models.read(tmp_path / "out"), models.read(base)
    wanted = dict(before)
    for name, module in in_four_bits(base).named_modules():
        if type(module).__name__ == "Linear4bit":
            wanted[f"{name}.weight"] = functional.dequantize_4bit(module.weight, module.weight.quant_state)
    apart = 0
    for name in before.keys() - {name for name in before if "k_proj" in name}:
        difference = np.abs(ours[name].numpy() - wanted[name].float().numpy())
        assert (difference <= 2e-6).mean() > 0.95, name  # a block is a hundredth of these
        assert difference.max() <= 0.05 * np.abs(before[name].numpy()).max(), name
        apart += not np.array_equal(ours[name].numpy(), before[name].numpy())
    assert apart >= 12


@pytest.fixture
def trained(tmp_path, models):
    """Make base and adapter, with the answers of the model that training would have ended with."""
    from peft import PeftModel

    from tunemill.parity import hf

    def make(four_bits):
        base = models.tiny("Llama", tmp_path / "base", "float32", **WIDE)
        adapter = models.random_adapter(models.load(base), tmp_path / "adapter", **SETTINGS)
        held = in_four_bits(base) if four_bits else models.load(base)
        chance = np.random.default_rng(0)
        chosen = Probes(
            tuple(
                Probe(
                    f"validation row {row}",
                    (),
                    Text("p", tuple(int(token) for token in chance.integers(0, 96, 9))),
                    Text("a", tuple(int(token) for token in chance.integers(0, 96, 3))),
                    (),
                    None,
                    (4, 8, 9),
                )
                for row in range(6)
            )
        )
        chosen.save(adapter)
        hf.measure_model(PeftModel.from_pretrained(held, adapter), chosen).save(adapter)
        return base, adapter

    return make


@pytest.mark.parametrize(("four_bits", "used"), [(True, "nf4"), (False, "16bit")])
def test_the_better_base_is_taken(tmp_path, models, trained, work, four_bits, used):
    base, adapter = trained(four_bits)
    this = work(base, adapter, FACTS)
    this = replace(this, scratch=tmp_path / "scratch")
    facts = merging._fold(this)
    assert facts["base_used"] == used
    figures = facts["base_candidates"]
    other = {"nf4": "16bit", "16bit": "nf4"}[used]
    assert figures[used]["mean_kl"] < min(1e-4, figures[other]["mean_kl"] / 20)
    assert figures[used]["positions"] == figures[other]["positions"] == 18
    assert not list(this.scratch.iterdir())
    name = "model.layers.0.mlp.up_proj.weight"  # which the adapter does not change
    same = np.array_equal(models.read(tmp_path / "out")[name].numpy(), models.read(base)[name].numpy())
    assert same == (used == "16bit")


def test_a_setting_overrides(tmp_path, models, trained, work):
    base, adapter = trained(four_bits=True)
    facts = merging._fold(work(base, adapter, FACTS, qlora_base="16bit"))
    assert facts["base_used"] == "16bit"
    assert "base_candidates" not in facts


def test_without_probes_the_base_is_as_published(tmp_path, models, work):
    base = models.tiny("Llama", tmp_path / "base", "float32")
    adapter = models.random_adapter(models.load(base), tmp_path / "adapter", **SETTINGS)
    facts = merge(work(base, adapter, FACTS))
    assert facts["base_used"] == "16bit"
    assert "no probes" in facts["base_reason"]


def test_an_adapter_that_was_not_trained_on_four_bits(tmp_path, models, work):
    base = models.tiny("Llama", tmp_path / "base", "float32")
    adapter = models.random_adapter(models.load(base), tmp_path / "adapter", **SETTINGS)
    assert "base_used" not in merge(work(base, adapter, {"quantization": None}))
    with pytest.raises(BadDataError, match="was not trained on 4 bits"):
        merge(replace(work_again(work, tmp_path, base, adapter), output=tmp_path / "again"))


def work_again(work, tmp_path, base, adapter):
    (tmp_path / "out").rename(tmp_path / "first")
    return work(base, adapter, qlora_base="nf4")


def test_a_model_whose_quantized_tensors_are_not_known(tmp_path, models, work):
    base = models.tiny("GPT2", tmp_path / "base", "float32")
    adapter = models.random_adapter(
        models.load(base), tmp_path / "adapter", r=2, target_modules=["c_attn"], fan_in_fan_out=True
    )
    with pytest.raises(BadDataError, match=r"'gpt2'.*set qlora_base=16bit"):
        merge(work(base, adapter, FACTS, qlora_base="nf4"))

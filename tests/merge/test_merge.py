"""The merge against PEFT's own, tensor for tensor, and everything it must refuse."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from tunemill.errors import BadDataError, TransientError
from tunemill.merge.adapter import read_adapter
from tunemill.merge.merge import merge
from tunemill.merge.plan import plan_merge
from tunemill.merge.rewrite import write_shard
from tunemill.weights import read_headers

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = [
    pytest.param({"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR}, id="all-linear"),
    pytest.param({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_rslora": True}, id="rslora"),
    pytest.param(
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ALL_LINEAR,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
            "alpha_pattern": {"o_proj": 32, "layers.0.self_attn.q_proj": 5},
        },
        id="patterns",
    ),
    pytest.param(
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["v_proj"],
            "modules_to_save": ["lm_head", "embed_tokens"],
        },
        id="modules-to-save",
    ),
    pytest.param({"r": 4, "lora_alpha": 8, "target_modules": ["lm_head", "q_proj"]}, id="lm-head"),
    pytest.param({"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "q_proj"]}, id="embedding"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_pefts_merge(tmp_path, models, work, dtype, settings):
    from peft import PeftModel

    base = models.tiny_llama(tmp_path / "base", dtype)
    adapter = models.random_adapter(models.load(base), tmp_path / "adapter", **settings)
    PeftModel.from_pretrained(models.load(base), adapter).merge_and_unload().save_pretrained(
        tmp_path / "peft"
    )
    facts = merge(work(base, adapter))
    ours, theirs, before = (models.read(tmp_path / name) for name in ("out", "peft", "base"))
    assert before.keys() == ours.keys()
    assert models.compare(ours, theirs, before, dtype) == facts["tensors_changed"] > 0


def test_rounds_once(tmp_path, models, work):
    """With the sum in float64 as the judge, no bfloat16 is further off than half a unit."""
    base = models.tiny_llama(tmp_path / "base", "bfloat16")
    adapter = models.random_adapter(
        models.load(base), tmp_path / "adapter", r=4, lora_alpha=8, target_modules=["up_proj"]
    )
    merge(work(base, adapter))
    from safetensors.torch import load_file

    pair = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    a, b = (pair[f"base_model.model.{name}.lora_{half}.weight"].double() for half in "AB")
    exact = models.read(base)[name + ".weight"].double() + 2 * b @ a
    got = models.read(tmp_path / "out")[name + ".weight"].double()
    assert ((got - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-9).all()


def test_shards_stay_as_they_are(tmp_path, models, work):
    base = models.tiny_llama(tmp_path / "base", "bfloat16", shard="60KB")
    adapter = models.random_adapter(
        models.load(base), tmp_path / "adapter", r=2, lora_alpha=4, target_modules=["k_proj"]
    )
    merge(work(base, adapter, n_threads=3))
    before, after = read_headers(base), read_headers(tmp_path / "out")
    assert len(before) > 2
    assert [header.tensors for header in before] == [header.tensors for header in after]
    untouched = 0
    for header in before:
        old, new = header.path.read_bytes(), (tmp_path / "out" / header.path.name).read_bytes()
        for tensor in header.tensors.values():
            area = slice(tensor.start, tensor.start + tensor.size)
            assert (old[area] == new[area]) == ("k_proj" not in tensor.name), tensor.name
            untouched += old[area] == new[area]
        assert old[: header.data_start] == new[: header.data_start]
    assert untouched


def test_files_beside_the_weights(tmp_path, models, work):
    base = models.tiny_llama(tmp_path / "base", "float32")
    adapter = models.random_adapter(
        models.load(base), tmp_path / "adapter", r=2, lora_alpha=4, target_modules=["k_proj"]
    )
    (adapter / "tokenizer.json").write_text('{"from": "adapter"}')
    (adapter / "metrics.csv").write_text("step,loss\n")
    merge(work(base, adapter))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in base.iterdir()} | {"tokenizer.json", "prompting.json"}
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {"from": "base"}
    assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == {"from": "adapter"}


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"target_modules": ["lm_head", "q_proj"]}, id="lm-head-lora"),
        pytest.param({"target_modules": ["embed_tokens"]}, id="embedding-lora"),
        pytest.param(
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, id="embedding-whole"
        ),
    ],
)
def test_tied_embeddings_come_apart_as_trained(tmp_path, models, work, settings, shard):
    """The merged model computes what base and adapter computed together, which PEFT's merge does not."""
    import torch
    from peft import PeftModel

    base = models.tiny_llama(tmp_path / "base", "float32", tied=True, shard=shard)
    adapter = models.random_adapter(models.load(base), tmp_path / "adapter", r=4, lora_alpha=8, **settings)
    facts = merge(work(base, adapter))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        trained = PeftModel.from_pretrained(models.load(base), adapter)(ids).logits
        merged = models.load(tmp_path / "out")(ids).logits
    assert facts["untied"]
    assert torch.allclose(trained, merged, atol=1e-4)
    read_headers(tmp_path / "out")


def test_tied_embeddings_stay_tied_when_untouched(tmp_path, models, work):
    base = models.tiny_llama(tmp_path / "base", "bfloat16", tied=True)
    adapter = models.random_adapter(
        models.load(base), tmp_path / "adapter", r=4, lora_alpha=8, target_modules=["q_proj"]
    )
    assert not merge(work(base, adapter))["untied"]
    assert "lm_head.weight" not in models.read(tmp_path / "out")


def test_fan_in_fan_out(tmp_path, models, work):
    """GPT-2 keeps its matrices transposed."""
    import torch
    from peft import PeftModel
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    base = tmp_path / "base"
    GPT2LMHeadModel(config).save_pretrained(base)
    adapter = models.random_adapter(
        models.load(base),
        tmp_path / "adapter",
        r=4,
        lora_alpha=8,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
    )
    peft = PeftModel.from_pretrained(models.load(base), adapter).merge_and_unload()
    merge(work(base, adapter))
    merged = models.load(tmp_path / "out")
    name = "transformer.h.1.attn.c_attn.weight"
    assert torch.allclose(peft.state_dict()[name], merged.state_dict()[name], atol=1e-6)


def test_full_weights_pass_through(tmp_path, models, work):
    base = models.tiny_llama(tmp_path / "base", "float32")
    trained = models.tiny_llama(tmp_path / "trained", "bfloat16", shard="60KB")
    (trained / "training.json").write_text("{}")
    facts = merge(work(base, trained))
    assert facts["method"] == "full"
    for path in trained.iterdir():
        copied = tmp_path / "out" / path.name
        assert (
            not copied.exists() if path.name == "training.json" else copied.read_bytes() == path.read_bytes()
        )


@pytest.fixture
def pair(tmp_path, models):
    base = models.tiny_llama(tmp_path / "base", "bfloat16")
    adapter = models.random_adapter(
        models.load(base), tmp_path / "adapter", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]
    )
    return base, adapter


def refused(work_, *words):
    with pytest.raises(BadDataError) as caught:
        merge(work_)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert caught.value.exit_code == 65
    assert not list(work_.output.glob("*.safetensors")), "nothing is written before the inputs are checked"


def test_adapter_of_another_base_by_content(pair, work):
    facts = {"base_content": "e" * 64, "base": "base/other@sha256:1234"}
    refused(work(*pair, facts), "base/other@sha256:1234", "base/tiny@sha256:", "t/adapter@")


def test_adapter_of_the_recorded_base(pair, work):
    assert merge(work(*pair, {"base_content": "c" * 64}))["base_proved"] is True


def test_adapter_of_another_shape(tmp_path, pair, models, work):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    other = tmp_path / "other"
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(other)
    refused(work(other, pair[1]), "another base", "[64, 160]", "[32, 64]")


def test_adapter_of_more_layers(tmp_path, pair, models, work):
    from transformers import LlamaConfig, LlamaForCausalLM

    other = tmp_path / "other"
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(other)
    refused(work(other, pair[1]), "another base", "layers.1.")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        pytest.param({"use_dora": True}, "magnitude", id="dora-without-magnitudes"),
        pytest.param({"use_qalora": True}, "use_qalora", id="qalora"),
        pytest.param({"layer_replication": [[0, 2]]}, "layer_replication", id="layer-replication"),
        pytest.param({"peft_type": "IA3"}, "IA3", id="ia3"),
        pytest.param({"init_lora_weights": "pissa_niter_4"}, "pissa", id="pissa"),
        pytest.param({"made_up_later": 3}, "made_up_later", id="unknown-setting"),
        pytest.param({"r": 8}, "rank 8", id="rank"),
        pytest.param({"r": "4"}, "r:", id="type"),
        pytest.param({"alpha_pattern": {"(": 4}}, "pattern", id="pattern"),
    ],
)
def test_settings_it_cannot_apply(pair, work, changes, word):
    edit(pair[1] / "adapter_config.json", **changes)
    refused(work(*pair), word, "adapter_config.json")


@pytest.mark.parametrize("which", [0, 1], ids=["base", "adapter"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-100], lambda data: data[:5], lambda data: b"\x00" * len(data)]
)
def test_damaged_weights(pair, work, which, damage):
    path = next(pair[which].glob("*.safetensors"))
    path.write_bytes(damage(path.read_bytes()))
    refused(work(*pair), str(path.name))


def test_half_a_pair(pair, work):
    from safetensors.numpy import load_file, save_file

    path = pair[1] / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, path)
    refused(work(*pair), "one half")


def test_a_diverged_adapter(pair, work):
    from safetensors.numpy import load_file, save_file

    path = pair[1] / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, path)
    with pytest.raises(BadDataError, match="not finite"):
        merge(work(*pair))


def test_a_sum_too_large_for_float16(tmp_path, models, work):
    base = models.tiny_llama(tmp_path / "base", "float16")
    adapter = models.random_adapter(
        models.load(base), tmp_path / "adapter", r=4, lora_alpha=8_000_000, target_modules=["q_proj"]
    )
    with pytest.raises(BadDataError, match="too large for F16"):
        merge(work(base, adapter))


def test_a_quantized_base(pair, work):
    edit(pair[0] / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    refused(work(*pair), "quantized")


def test_a_missing_shard(tmp_path, models, pair, work):
    base = models.tiny_llama(tmp_path / "sharded", "bfloat16", shard="60KB")
    victim = sorted(base.glob("*.safetensors"))[1]
    victim.unlink()
    refused(work(base, pair[1]), victim.name)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_noticed_before(pair, work, small_disk):
    this = replace(work(*pair), output=small_disk)
    with pytest.raises(TransientError, match="free some space"):
        merge(this)
    assert not list(small_disk.iterdir())


def test_a_disk_that_fills_up_meanwhile(pair, small_disk):
    plan = plan_merge(read_headers(pair[0]), read_adapter(pair[1]).changes, {}, "the adapter")
    with ThreadPoolExecutor(2) as pool, pytest.raises(TransientError, match="no space left"):
        write_shard(
            plan.shards[0], [pair[1] / "adapter_model.safetensors"], small_disk / "x", pool, lambda n: None
        )


MEASURED = """
import resource, sys
from pathlib import Path
from tunemill.merge.config import MergeConfig
from tunemill.merge.merge import merge
from tunemill.progress import Progress
from tunemill.work import Input, Work
base, adapter, output = map(Path, sys.argv[1:])
inputs = {role: Input(role, "", role, path, {}) for role, path in (("base", base), ("adapter", adapter))}
work = Work(MergeConfig(n_threads=2), inputs, output, output, Progress(quiet=True), None)
status = Path("/proc/self/status")
def peak():  # ru_maxrss would count the test's own process, which this one was forked from
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
merge(work)
print(peak() - before)
print("torch" in sys.modules)
"""


def test_memory_stays_small_and_torch_away(tmp_path):
    """Two matrices of 134 MB, holes in the file: merging them takes less than 60 MB more."""
    from safetensors.numpy import save_file

    base, adapter, output = (tmp_path / name for name in ("base", "adapter", "out"))
    for directory in (base, adapter, output):
        directory.mkdir()
    rows, columns = 8192, 8192
    entries = {
        f"model.{name}.weight": {
            "dtype": "BF16",
            "shape": [rows, columns],
            "data_offsets": [2 * rows * columns * place, 2 * rows * columns * (place + 1)],
        }
        for place, name in enumerate(("a", "b"))
    }
    text = json.dumps(entries).encode()
    with (base / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 4 * rows * columns)
    (base / "config.json").write_text("{}")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    halves = {"A": np.ones((4, columns), np.float32), "B": np.ones((rows, 4), np.float32)}
    pair = {f"base_model.model.model.a.lora_{half}.weight": array for half, array in halves.items()}
    save_file(pair, adapter / "adapter_model.safetensors")
    command = [sys.executable, "-c", MEASURED, str(base), str(adapter), str(output)]
    grown, torch = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(grown) < 60_000_000
    assert torch == "False"
    merged = np.memmap(output / "model.safetensors", "<u2", "r", offset=8 + len(text))
    assert (merged[: rows * columns : 997] == 0x4100).all(), "0 + 8 / 4 * (4 * 1 * 1) = 8 in bfloat16"
    assert not merged[rows * columns :: 997].any()

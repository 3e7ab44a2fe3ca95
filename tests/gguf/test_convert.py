"""Conversion by llama.cpp's own scripts, and everything that must stop it."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest

from tunemill.errors import BadDataError, ConfigurationError, Stopped, TransientError
from tunemill.gguf.child import read_end
from tunemill.gguf.config import ConvertConfig
from tunemill.gguf.convert import check, convert, convert_lora
from tunemill.gguf.header import read_gguf
from tunemill.gguf.library import Library
from tunemill.gguf.staging import stage_adapter, stage_model
from tunemill.prompting import read_prompting
from tunemill.weights import read_header

pytestmark = pytest.mark.usefixtures("converter")


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def edit(path, drop=(), **changes):
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if key not in drop}))


@pytest.mark.parametrize(
    ("outtype", "types"),
    [
        pytest.param("f16", {"F16": 16, "F32": 5}, id="f16"),
        pytest.param("bf16", {"BF16": 16, "F32": 5}, id="bf16"),
        pytest.param("q8_0", {"F32": 5, "Q8_0": 16}, id="q8_0"),
    ],
)
def test_converts_a_model(work, model, data, outtype, types):
    this = work(ConvertConfig(outtype=outtype), merged=model, data=data)
    facts = convert(this)
    names = {path.name for path in this.output.iterdir()}
    assert names == {f"model-{outtype.upper()}.gguf", "tokens.json", "prompting.json"}
    header = read_gguf(this.output / f"model-{outtype.upper()}.gguf")
    assert header.types() == types == facts["tensor_types"]
    assert header.architecture == facts["architecture"] == "llama"
    assert facts["tokens"]["texts"] == 400
    assert facts["llama_cpp"] == "0.3.36"
    assert read_prompting(this.output) == read_prompting(model)


def test_weights_survive_bit_for_bit(work, model, data):
    """A matrix is stored as it was; a query's rows in the rotary order that llama.cpp wants.

    The same run proves that the converter understands what transformers 5 calls rope_parameters, and
    that llama.cpp loads the result.
    """
    from safetensors import safe_open

    edit(model / "config.json", rope_parameters=LLAMA3_ROPE)
    this = work(ConvertConfig(outtype="f32"), merged=model, data=data)
    facts = convert(this)
    file = this.output / "model-F32.gguf"
    header, stored = read_gguf(file), file.read_bytes()
    arrays = {
        tensor.name: np.frombuffer(stored, "<f4", tensor.size // 4, tensor.start).reshape(tensor.shape[::-1])
        for tensor in header.tensors
    }
    with safe_open(model / "model.safetensors", "pt") as weights:
        down = weights.get_tensor("model.layers.1.mlp.down_proj.weight").float().numpy()
        query = weights.get_tensor("model.layers.1.self_attn.q_proj.weight").float().numpy()
    assert np.array_equal(arrays["blk.1.ffn_down.weight"], down)
    permuted = query.reshape(4, 2, 32, 256).swapaxes(1, 2).reshape(256, 256)
    assert np.array_equal(arrays["blk.1.attn_q.weight"], permuted)
    assert set(facts["tensor_types"]) == {"F32"}
    assert "rope_freqs.weight" in arrays
    assert header.metadata["llama.rope.freq_base"] == 500000.0
    loaded = Library(this.scratch, threading.Event()).load(file)
    assert loaded.value["parameters"] == sum(array.size for array in arrays.values())


def test_a_tokenizer_saved_by_transformers_5(work, model, data):
    """It leaves added_tokens_decoder out, and llama.cpp would read <|user|> as seven letters."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(model).save_pretrained(model)
    saved = json.loads((model / "tokenizer_config.json").read_text())
    assert "added_tokens_decoder" not in saved, (
        "transformers writes it again: stage_model has become needless"
    )
    this = work(ConvertConfig(), merged=model, data=data)
    assert convert(this)["tokens"]["texts"] == 400
    assert "added_tokens_decoder" not in (model / "tokenizer_config.json").read_text()


def test_staging_keeps_files_as_they_are(model, tmp_path):
    staged = stage_model(model, tmp_path / "staged")
    assert {path.name for path in staged.iterdir()} == {path.name for path in model.iterdir()}
    for path in staged.iterdir():
        assert path.read_bytes() == (model / path.name).read_bytes()


def refused(stage, this, *words, error=BadDataError, code=65):
    with pytest.raises(error) as caught:
        stage(this)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert caught.value.exit_code == code


def test_a_lost_prefix_space_stops_it(work, model, data):
    """The same fault as a real one: the GGUF says that words begin with a space, the model does not."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(model).save_pretrained(model)  # tokenizer.json now decides
    edit(model / "tokenizer_config.json", add_prefix_space=True)
    this = work(ConvertConfig(), merged=model, data=data)
    refused(convert, this, "tokenized differently", "train row 0", "token ", "add_prefix_space")


def test_an_unsupported_architecture(work, model, data):
    edit(model / "config.json", architectures=["MadeUpForCausalLM"])
    this = work(ConvertConfig(), merged=model, data=data)
    refused(convert, this, "t/merged@sha256:", "MadeUpForCausalLM is not supported")
    assert not list(this.output.glob("*.gguf"))


def test_a_missing_tensor(work, model, data):
    from safetensors.torch import load_file, save_file

    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.strange_proj.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, path)
    this = work(ConvertConfig(), merged=model, data=data)
    refused(convert, this, "strange_proj")


def test_a_truncated_model(work, model, data):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    this = work(ConvertConfig(), merged=model, data=data)
    refused(convert, this, "cut short", "model.safetensors")


def test_too_little_memory(work, model, data):
    this = work(ConvertConfig(convert_memory_gb=0.05), merged=model, data=data)
    refused(convert, this, "0.1 GB", error=ConfigurationError, code=78)


def test_too_little_time(work, model, data):
    this = work(ConvertConfig(convert_timeout=0.2), merged=model, data=data)
    refused(convert, this, "longer than 0 s", error=TransientError, code=75)


def test_a_disk_that_fills_up_meanwhile(work, model, data, small_disk):
    """It has room for the weights, which is checked before, but not for the vocabulary."""
    numbers = sum(tensor.size // 2 for tensor in read_header(model / "model.safetensors").tensors.values())
    this = replace(work(ConvertConfig(), merged=model, data=data), output=small_disk(numbers * 2 + 4096))
    refused(convert, this, "no space left", error=TransientError, code=75)


def test_a_stop_ends_the_converter(work, model, data):
    this = work(ConvertConfig(), merged=model, data=data)
    threading.Timer(0.5, this.stop.set).start()
    refused(convert, this, "stopped", error=Stopped, code=143)
    assert "Model successfully exported" not in read_end(this.scratch / "converter" / "log")


def test_the_converter_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("TUNEMILL_LLAMA_CPP", str(tmp_path))
    refused(check, ConvertConfig(), "python -m tunemill.gguf.source", error=ConfigurationError, code=78)


# The adapter alone.


@pytest.fixture
def adapter(model, tmp_path):
    return save_adapter(
        model, tmp_path / "adapter", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]
    )


def save_adapter(model, directory, **settings):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    peft_model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.1)
    peft_model.save_pretrained(directory)
    return directory


def test_converts_an_adapter(work, model, adapter):
    this = work(ConvertConfig(outtype="f32"), base=model, adapter=adapter)
    facts = convert_lora(this)
    header = read_gguf(this.output / "model-LORA.gguf")
    assert facts["tensors"] == len(header.tensors) == 2 * 2 * 2
    assert header.metadata["general.type"] == "adapter"
    assert header.metadata["adapter.lora.alpha"] == 8.0


def test_rslora_gets_an_alpha_that_means_the_same(model, tmp_path):
    adapter = save_adapter(
        model, tmp_path / "adapter", r=4, lora_alpha=8, target_modules=["q_proj"], use_rslora=True
    )
    staged = stage_adapter(adapter, tmp_path / "staged")
    assert json.loads((staged / "adapter_config.json").read_text())["lora_alpha"] / 4 == 8 / 4**0.5


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 3}}, "rank_pattern"),
    ],
)
def test_adapters_that_a_gguf_cannot_express(work, model, adapter, changes, word):
    edit(adapter / "adapter_config.json", **changes)
    refused(convert_lora, work(ConvertConfig(), base=model, adapter=adapter), word)


def test_an_adapter_of_another_base(work, model, adapter):
    this = work(ConvertConfig(), base=model, adapter=adapter)
    this.inputs["adapter"].facts["base_content"] = "e" * 64
    refused(convert_lora, this, "t/adapter@", "t/base@")


def test_a_truncated_adapter(work, model, adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    refused(convert_lora, work(ConvertConfig(), base=model, adapter=adapter), "cut short")


def test_full_weights_are_no_adapter(work, model):
    refused(convert_lora, work(ConvertConfig(), base=model, adapter=model), "no LoRA adapter")

"""Added tokens, resized vocabularies, and embeddings that share their tensor with the output."""

import json

import numpy as np
import pytest

from tunemill.errors import BadDataError
from tunemill.merge.merge import merge
from tunemill.weights import read_headers

ONE = {"r": 4, "lora_alpha": 8}
Q = {"target_modules": ["q_proj"]}
BOTH = ["embed_tokens", "lm_head"]
RESIZED = {
    "saved-along": Q,
    "tokens": Q | {"trainable_token_indices": [96, 99]},
    "modules-to-save": Q | {"modules_to_save": BOTH},
    "lora": {"target_modules": ["q_proj", *BOTH]},
}
TIED = {
    "saved-along": Q,
    "tokens": Q | {"trainable_token_indices": [96, 99, 3]},
    "modules-to-save": Q | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "lora": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
}


@pytest.fixture
def resized(tmp_path, models):
    """Make a base and an adapter that was trained with four more tokens."""
    import torch

    def make(settings, rows=100, dtype="float32", shard="5GB", tied=False):
        base = models.tiny_llama(tmp_path / "base", dtype, tied=tied, shard=shard)
        model = models.load(base)
        torch.manual_seed(1)
        model.resize_token_embeddings(rows, mean_resizing=False)
        return base, models.random_adapter(model, tmp_path / "adapter", **ONE, **settings)

    return make


def trained(models, base, adapter, rows):
    """Return the base, resized, with the adapter on it."""
    from peft import PeftModel

    model = models.load(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter)


def logits(model):
    import torch

    with torch.no_grad():
        return model(torch.arange(85, 100)[None] % model.config.vocab_size).logits


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", RESIZED)
def test_a_resized_vocabulary(tmp_path, models, work, resized, case, dtype, shard):
    from safetensors.torch import load_file

    base, adapter = resized(RESIZED[case], dtype=dtype, shard=shard)
    facts = merge(work(base, adapter))
    trained(models, base, adapter, 100).merge_and_unload().save_pretrained(tmp_path / "peft")
    ours, theirs, before = (models.read(tmp_path / name) for name in ("out", "peft", "base"))
    saved = load_file(adapter / "adapter_model.safetensors")
    for name in before:  # what the product was added to
        key = "base_model.model." + name.replace(".weight", ".base_layer.weight")
        before[name] = saved.get(key, before[name])
    assert models.compare(ours, theirs, before, dtype) == facts["tensors_changed"]
    assert facts["vocabulary"] == 100
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 100
    assert models.load(tmp_path / "out").get_output_embeddings().weight.shape[0] == 100
    headers = read_headers(tmp_path / "out")
    assert all(header.metadata == {"format": "pt"} for header in headers)
    index = tmp_path / "out/model.safetensors.index.json"
    assert index.exists() == (shard == "60KB")
    if index.exists():
        total = sum(tensor.size for header in headers for tensor in header.tensors.values())
        merged = models.load(tmp_path / "out")
        count = sum(parameter.numel() for parameter in merged.parameters())
        assert json.loads(index.read_text())["metadata"] == {"total_size": total, "total_parameters": count}


@pytest.mark.parametrize("rows", [96, 100])
@pytest.mark.parametrize("case", TIED)
def test_tied_embeddings_stay_tied(tmp_path, models, work, resized, case, rows):
    """What training kept tied stays one tensor, and computes what base and adapter computed."""
    settings = dict(TIED[case])
    if rows == 96 and "trainable_token_indices" in settings:
        settings["trainable_token_indices"] = [90, 3]
    base, adapter = resized(settings, rows=rows, tied=True)
    facts = merge(work(base, adapter))
    assert not facts["untied"]
    assert "lm_head.weight" not in models.read(tmp_path / "out")
    merged = models.load(tmp_path / "out")
    assert merged.config.tie_word_embeddings
    wanted = logits(trained(models, base, adapter, rows))
    assert np.allclose(wanted.numpy(), logits(merged).numpy(), atol=1e-4)


def test_tokens_of_the_input_alone_tear_tied_embeddings_apart(tmp_path, models, work, resized):
    settings = Q | {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]}}
    base, adapter = resized(settings, rows=96, tied=True)
    assert merge(work(base, adapter))["untied"]
    wanted = logits(trained(models, base, adapter, 96))
    assert np.allclose(wanted.numpy(), logits(models.load(tmp_path / "out")).numpy(), atol=1e-4)


def test_embeddings_resized_only_in_part(models, work, resized):
    from safetensors.numpy import load_file, save_file

    base, adapter = resized(Q)
    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "lm_head" not in name}, path)
    with pytest.raises(BadDataError, match=r"only in part .*embed_tokens.weight 100, lm_head.weight 96"):
        merge(work(base, adapter))


def test_tokens_beyond_the_vocabulary(pair_of_tokens, work):
    base, adapter = pair_of_tokens
    with pytest.raises(BadDataError, match="trained on another base"):
        merge(work(base, adapter))


@pytest.fixture
def pair_of_tokens(resized):
    base, adapter = resized(Q | {"trainable_token_indices": [3, 5]}, rows=96)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": [3, 96]}))
    return base, adapter


@pytest.mark.parametrize("indices", [[3], [3, 3], [-1, 3], {"embed_tokens": []}], ids=str)
def test_tokens_that_do_not_fit_their_rows(pair_of_tokens, work, indices):
    base, adapter = pair_of_tokens
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": indices}))
    with pytest.raises(BadDataError, match="trainable_token_indices"):
        merge(work(base, adapter))

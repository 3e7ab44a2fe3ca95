"""Both engines against the plainest way to compute the same: each text whole, in float32, by itself."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from tunemill.errors import BadDataError
from tunemill.parity import hf
from tunemill.parity.compare import compare
from tunemill.parity.distributions import Distributions
from tunemill.parity.measure import log_softmax
from tunemill.parity.probes import Probes, Rendering, choose
from tunemill.prompting import read_prompting

from .toy import LABELS, make_base, make_data, row_of


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("engines") / "base", seed=3)


@pytest.fixture(scope="module")
def probes(base) -> Probes:
    rendering = Rendering(read_prompting(base), hf.tokenizer_of(base), 400)
    return choose([row_of(number) for number in range(12)], "train", LABELS, rendering, 6)


def load(directory, dtype):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def plainly(model, probes: Probes) -> Distributions:
    """Read every text whole, without a cache and without tricks."""
    rows, labels = [], np.zeros((len(probes.probes), probes.labels))
    with torch.no_grad():
        for number, probe in enumerate(probes.probes):
            read = probabilities(model, (*probe.prompt.tokens, *probe.answer.tokens))
            rows.append(read[list(probe.positions)])
            for place, label in enumerate(probe.labels):
                read = probabilities(model, (*probe.prompt.tokens, *label.tokens))
                steps = range(len(probe.prompt.tokens) - 1, len(read) - 1)
                labels[number, place] = read[steps, label.tokens].sum()
    return Distributions(probes.digest, np.concatenate(rows).astype(np.float16), labels)


def probabilities(model, tokens):
    return log_softmax(model(torch.tensor([tokens])).logits[0].numpy())


def test_a_model_of_16_bits_is_computed_in_float32(base, probes):
    expected = plainly(load(base, torch.float32), probes)
    found = hf.measure(base, probes)
    assert compare(probes, expected, found).worst_kl < 1e-5
    assert (found.labels.argmax(axis=1) == expected.labels.argmax(axis=1)).all()
    best = expected.labels.argmax(axis=1)
    np.testing.assert_allclose(
        found.labels[range(6), best], expected.labels[range(6), best], atol=1e-4, rtol=0
    )


def test_in_16_bits_throughout_it_would_be_further_away(base, probes):
    """Else raising the weights were not worth its lines."""
    expected, found = plainly(load(base, torch.float32), probes), hf.measure(base, probes)
    model = load(base, torch.bfloat16)
    rough = plainly(lambda tokens: converted(model(tokens)), probes)
    assert compare(probes, expected, rough).mean_kl > 5 * compare(probes, expected, found).mean_kl


def converted(output):
    output.logits = output.logits.float()
    return output


def test_the_model_is_as_it_was_afterwards(base, probes):
    model = load(base, torch.bfloat16).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    first = hf.measure_model(model, probes)
    assert model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert (hf.measure_model(model, probes).rows == first.rows).all()


def test_many_labels_do_not_fit_at_once_and_count_the_same(base, probes, monkeypatch):
    whole = hf.measure(base, probes)
    monkeypatch.setattr(hf, "CACHED_TOKENS", 25)
    parted = hf.measure(base, probes)
    np.testing.assert_allclose(parted.labels, whole.labels, atol=1e-4, rtol=0)
    assert compare(probes, whole, parted).worst_kl < 1e-5


def test_llama_cpp_answers_the_same(base, probes, tmp_path):
    from types import SimpleNamespace

    from tunemill.gguf.config import ConvertConfig
    from tunemill.gguf.convert import convert
    from tunemill.gguf.library import Library
    from tunemill.progress import Progress
    from tunemill.work import Input, Work

    data = make_data(tmp_path / "data")
    output = tmp_path / "out"
    output.mkdir()
    inputs = {
        role: Input(f"t/{role}@sha256:{'a' * 64}", "c" * 64, role, path, {})
        for role, path in (("merged", base), ("data", data))
    }
    config = ConvertConfig(outtype="f32")
    facts = convert(
        Work(config, inputs, output, tmp_path / "scratch", Progress(quiet=True), SimpleNamespace())
    )
    assert facts["parity"]["verdict"] == "none"
    counted = []
    found = Library(tmp_path / "child", threading.Event()).measure(
        output / "model-F32.gguf", probes, lambda: counted.append(1)
    )
    expected = hf.measure(base, probes)
    assert compare(probes, expected, found).worst_kl < 1e-5
    np.testing.assert_allclose(found.labels, expected.labels, atol=1e-3, rtol=0)
    assert len(counted) <= 6
    assert not (tmp_path / "child" / "parity").exists()


def test_a_damaged_model_is_one_line(base, probes, tmp_path):
    import shutil

    shutil.copytree(base, tmp_path / "damaged")
    shard = sorted((tmp_path / "damaged").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(BadDataError, match="cannot be loaded") as error:
        hf.measure(tmp_path / "damaged", probes)
    assert "\n" not in str(error.value)

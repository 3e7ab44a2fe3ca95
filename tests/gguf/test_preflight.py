"""What is found out about a model before it is trained, through the command and before training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from tunemill.errors import BadDataError
from tunemill.gguf import preflight as module
from tunemill.gguf.preflight import before_training, preflight, refuse

pytestmark = pytest.mark.usefixtures("converter")


@pytest.fixture
def find(model, tmp_path):
    """Run it without weights: nothing of it may need them."""
    (model / "model.safetensors").unlink()

    def run():
        found = preflight(model, tmp_path / "scratch", threading.Event())
        return {finding.subject: finding for finding in found}

    return run


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(found, subject, *words):
    assert not found[subject].fine
    assert "\n" not in str(found[subject])
    assert all(word in found[subject].said for word in words), found[subject].said
    with pytest.raises(BadDataError, match=subject):
        refuse(list(found.values()))


def test_a_pre_tokenizer_that_llama_cpp_does_not_know(find, model):
    from tokenizers import Tokenizer, models, pre_tokenizers

    (model / "tokenizer.model").unlink()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.save(str(model / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages[0].content }}"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(find(), "tokenizer", "pre-tokenizer was not recognized")


def test_a_lost_prefix_space(find, model):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(model).save_pretrained(model)
    edit(model / "tokenizer_config.json", add_prefix_space=True)
    refused(find(), "tokenizer", "tokenized differently")


def test_a_template_that_asks_who_renders_it(find, model):
    """llama-cpp-python passes names that transformers does not; a template may look for them."""
    text = "{% for m in messages %}{{ m.content }}{% endfor %}{% if functions is defined %}!{% endif %}"
    (model / "chat_template.jinja").write_text(text)
    refused(find(), "chat template", "in training", "in llama-cpp-python")


def test_a_template_that_says_the_date_is_no_difference(find, model):
    (model / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert find()["chat template"].fine


@pytest.fixture
def training(model, tmp_path):
    """As much of a train stage's work as the check before it reads."""
    said = []
    return SimpleNamespace(
        config=SimpleNamespace(preflight=True),
        inputs={"base": SimpleNamespace(path=model, reference="base/m@sha256:1")},
        scratch=tmp_path / "scratch",
        stop=threading.Event(),
        progress=SimpleNamespace(say=said.append),
        said=said,
    )


def test_training_is_refused_in_time(training, model):
    edit(model / "config.json", architectures=["MadeUpForCausalLM"])
    with pytest.raises(BadDataError, match="MadeUpForCausalLM is not supported") as caught:
        before_training(training)
    assert "\n" not in str(caught.value)
    training.config.preflight = False
    assert before_training(training) == {"preflight": "off"}


def test_what_was_found_is_recorded(training, model):
    (model / "model.safetensors").unlink()  # nothing of it may need the weights
    found = before_training(training)["preflight"]
    assert [line.partition(":")[0] for line in found] == [
        "ok  architecture",
        "ok  tokenizer",
        "ok  chat template",
    ]
    assert "the same tokens" in found[1]
    assert not (training.scratch / "preflight").exists()


def test_without_a_converter_training_goes_on_and_says_so(training, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEMILL_LLAMA_CPP", str(tmp_path))
    assert before_training(training) == {"preflight": "not checked: no converter"}
    assert "tunemill convert --check base/m@sha256:1" in training.said[0]


def tunemill(directory, *words):
    return subprocess.run(
        [sys.executable, "-m", "tunemill.cli", *words],
        cwd=directory,
        env={**os.environ, "TUNEMILL_CACHE": str(directory / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command(model, tmp_path):
    for name in ("base/mine", "mine/data"):
        kind = "base" if name == "base/mine" else "data"
        pushed = tunemill(tmp_path, "store", "push", str(model), name, "--kind", kind)
        assert pushed.returncode == 0, pushed.stderr
    fine = tunemill(tmp_path, "convert", "--check", "base/mine")
    assert fine.returncode == 0, fine.stderr
    assert [line[:2] for line in fine.stdout.splitlines()] == ["ok"] * 3
    pulled = [path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert 0 < max(pulled) < (model / "model.safetensors").stat().st_size / 2  # without its weights
    assert tunemill(tmp_path, "convert", "--check", "mine/data").returncode == 2
    unfit = shutil.copytree(model, tmp_path / "unfit")
    edit(unfit / "config.json", architectures=["MadeUpForCausalLM"])
    ended = tunemill(tmp_path, "convert", "--check", str(unfit), "--json")
    assert ended.returncode == 65
    assert ended.stderr.count("\n") == 1
    assert json.loads(ended.stdout)["findings"][0]["fine"] is False


def test_a_recipe_whose_model_is_still_to_be_made(tmp_path):
    ended = tunemill(tmp_path, "convert", "--check", "tiny")
    assert ended.returncode == 2
    assert "tunemill fetch" in ended.stderr


def test_findings_name_every_conversation_kind():
    roles = {message["role"] for conversation in module.CONVERSATIONS for message in conversation}
    assert roles == {"user", "system", "assistant"}

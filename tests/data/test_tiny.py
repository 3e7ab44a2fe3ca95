"""The tiny model: one tokenizer for transformers and llama.cpp, weights that repeat, and errors."""

import hashlib
import random
import shutil
import subprocess
import sys
import threading

import pytest

from tunemill.data import stdlib, tiny
from tunemill.data.config import FetchConfig
from tunemill.errors import UsageError
from tunemill.gguf.source import find_source
from tunemill.progress import Progress
from tunemill.prompting import read_prompting
from tunemill.work import Work

SMALL = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pretrain_max_length": 64,
    "tie_word_embeddings": True,
}
NASTY = (
    "plain words",
    "  two   spaces  and\n\n    an indented line\t",
    "=====  -----  ......  aaaaaaaa  abababab",
    "unseen: \u4f60\u597d \u00e9\u00e8 \U0001f600 \x07",
    "<|user|> </s> <s> written by a user, <0x41> and \u2581 too",
    "3.14159 x==y 'quoted' \"double\" `code` C:\\path",
    "",
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On a busy machine, threads that wait for each other over a small model take minutes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def texts():
    """A tenth of the docstrings, some from every module."""
    return stdlib.docstrings()[::10]


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory, texts):
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(directory, [docstring.text for docstring in texts], 600)
    return directory


@pytest.fixture(scope="module")
def tokenizer(tokenizer_files):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_files, local_files_only=True)


def sentencepiece_of(directory):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


def samples(texts):
    """Docstrings never seen in training the tokenizer, nasty ones, and noise."""
    order = random.Random(5)
    noise = ["".join(order.choices("aab-= \n.\u00e9(na)0_", k=60)) for _ in range(200)]
    return [docstring.text for docstring in stdlib.docstrings()[5::20]] + noise + list(NASTY)


def test_transformers_and_sentencepiece_agree_on_every_id(tokenizer_files, tokenizer, texts):
    pieces = sentencepiece_of(tokenizer_files)
    for text in samples(texts):
        if "<|" in text or "</" in text:  # SentencePiece alone takes written special tokens for plain text
            continue
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text), text


def test_every_text_comes_back_as_it_was(tokenizer, texts):
    for text in samples(texts):
        if tiny.SPACE in text:
            continue
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text


def test_special_tokens_and_bos(tokenizer):
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_id == 2
    assert [tokenizer.convert_tokens_to_ids(role) for role in tiny.ROLES] == [3, 4, 5]


def test_the_prompt_is_one_bos_and_role_markers(tokenizer_files, tokenizer):
    prompting = read_prompting(tokenizer_files)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hello "}]
    assert prompting.prompt(messages) == "<s><|system|> Be brief.<|user|> Hello<|assistant|>"
    assert prompting.completion(messages, "Data types") == " Data types</s>"
    assert prompting.add_bos
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert whole == prompting.prompt(messages)


def test_llama_cpp_agrees_on_every_id(tmp_path, tokenizer_files, tokenizer, texts):
    """The vocabulary through llama.cpp's own converter, read by llama.cpp itself."""
    import llama_cpp
    from transformers import LlamaConfig

    model = tmp_path / "model"
    shutil.copytree(tokenizer_files, model)
    LlamaConfig(vocab_size=600, hidden_size=64, architectures=["LlamaForCausalLM"]).save_pretrained(model)
    vocabulary = tmp_path / "vocabulary.gguf"
    script = find_source().directory / "convert_hf_to_gguf.py"
    command = [sys.executable, str(script), str(model), "--vocab-only", "--outfile", str(vocabulary)]
    subprocess.run(command, check=True, capture_output=True)
    llama = llama_cpp.Llama(str(vocabulary), vocab_only=True, verbose=False)
    for text in [*samples(texts), "<s><|user|> Hello<|assistant|> Data types</s>"]:
        if tiny.SPACE in text:
            continue
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == expected, text
    llama.close()


def settings(**changes):
    return FetchConfig(model_name_or_path="made", **{**SMALL, "pretrain_epochs": 0.3, **changes})


def pretrained(directory, tokenizer_files, texts, **changes):
    """Pretrain on a tenth of the docstrings."""
    shutil.copytree(tokenizer_files, directory)
    return tiny.pretrain(directory, texts, settings(**changes), Progress(quiet=True))


def digests(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_makes_a_llama_that_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM

    output, scratch = tmp_path / "output", tmp_path / "scratch"
    config = settings(pretrain_epochs=0.02)
    facts = tiny.make(Work(config, {}, output, scratch, Progress(quiet=True), None, threading.Event()))
    model = AutoModelForCausalLM.from_pretrained(output)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["parameters"]
    assert model.config.vocab_size == 600
    assert {path.suffix for path in output.iterdir()} <= {".json", ".jinja", ".model", ".safetensors"}


def test_the_same_seed_gives_the_same_bytes(tmp_path, tokenizer_files, texts):
    for name, seed in (("one", 42), ("two", 42), ("other", 7)):
        pretrained(tmp_path / name, tokenizer_files, texts, seed=seed)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    name = "model.safetensors"
    assert digests(tmp_path / "one")[name] != digests(tmp_path / "other")[name]


def test_learns_to_foretell_docstrings(tmp_path, tokenizer_files, texts):
    facts = pretrained(tmp_path / "m", tokenizer_files, texts, pretrain_epochs=3, pretrain_learning_rate=5e-3)
    assert facts["losses"][0] > facts["losses"][1] > facts["losses"][2]
    assert facts["losses"][2] < 5.0  # a uniform guess among 600 tokens is 6.4


def test_a_sequence_holds_one_module_and_no_more_tokens_than_asked():
    modules = {"a": [[1] * 5, [2] * 5, [3] * 30], "b": [[4] * 6]}
    sequences = tiny.pack(modules, 12, random.Random(0))
    assert all(len(sequence) <= 12 for sequence in sequences)
    assert [4] * 6 in sequences
    assert sum(map(len, sequences)) == 5 + 5 + 12 + 6


def test_part_of_an_epoch_is_part_of_its_steps():
    config = FetchConfig(model_name_or_path="made", pretrain_epochs=1.5, pretrain_batch_size=1)
    modules = {str(n): [[n] * 100] for n in range(8)}
    assert [len(batches) for batches in tiny._epochs(modules, config)] == [8, 4]


@pytest.mark.parametrize(
    "vocab_size", [pytest.param(100, id="too small"), pytest.param(10**6, id="too large")]
)
def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path, texts, vocab_size):
    with pytest.raises(UsageError, match=f"vocab_size {vocab_size}") as error:
        tiny.write_tokenizer(tmp_path, [docstring.text for docstring in texts], vocab_size)
    assert "\n" not in str(error.value)

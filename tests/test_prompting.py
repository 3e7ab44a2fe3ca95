"""Prompts and completions come out exactly as the model's own chat template means them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunemill.errors import BadDataError
from tunemill.prompting import Prompting, read_prompting

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
BARE = "{% for m in messages %}{{ m.content }}|{% endfor %}"
REWRITING = "{% if add_generation_prompt %}Q:{{ messages[0].content }} A:{% else %}done{% endif %}"
ASK = [{"role": "user", "content": "Which topic?"}]


@pytest.mark.parametrize(
    ("template", "add_bos", "prompt", "completion"),
    [
        pytest.param(
            CHATML,
            False,
            "<|im_start|>user\nWhich topic?<|im_end|>\n<|im_start|>assistant\n",
            "Health<|im_end|>",
            id="chatml-ends-the-turn-itself",
        ),
        pytest.param(
            LLAMA2, True, "<s>[INST] Which topic? [/INST]", " Health </s>", id="template-writes-bos-once"
        ),
        pytest.param(
            CHATML.replace("<|im_end|>", ""), True, None, "Health</s>", id="eos-added-where-missing"
        ),
        pytest.param(REWRITING, False, "Q:Which topic? A:", "Health</s>", id="template-that-rewrites-turns"),
    ],
)
def test_prompt_and_completion(template: str, add_bos: bool, prompt: str | None, completion: str) -> None:
    prompting = Prompting(template, "<s>", "</s>", add_bos)
    rendered = prompting.prompt(ASK)
    if prompt is not None:
        assert rendered == prompt
    assert rendered.count("<s>") == int(add_bos)
    assert prompting.completion(ASK, "Health") == completion


def test_the_same_as_transformers_renders(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is in the train extra only")
    from tokenizers import Tokenizer, models

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>")),
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    messages = [{"role": "system", "content": "Be brief, “please”."}, *ASK]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert read_prompting(tmp_path).prompt(messages) == expected


@pytest.mark.parametrize(
    ("config", "processor", "adds"),
    [
        pytest.param({"add_bos_token": True}, None, True, id="flag-on"),
        pytest.param({"add_bos_token": False}, {"single": "<s>"}, False, id="flag-wins-over-processor"),
        pytest.param({}, {"single": [{"SpecialToken": {"id": "<s>"}}]}, True, id="post-processor"),
        pytest.param({}, None, False, id="neither"),
    ],
)
def test_bos_is_read_from_the_tokenizer(
    tmp_path: Path, config: dict[str, object], processor: object, adds: bool
) -> None:
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": CHATML} | config
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"post_processor": processor}))
    assert read_prompting(tmp_path).add_bos is adds


def test_saved_and_read_again(tmp_path: Path) -> None:
    prompting = Prompting(CHATML, "<s>", "</s>", True)
    prompting.save(tmp_path)
    assert read_prompting(tmp_path) == prompting


@pytest.mark.parametrize(
    "template",
    [
        pytest.param("{{ ''.__class__.__mro__[1].__subclasses__() }}", id="climbs-to-object"),
        pytest.param("{{ messages.append(1) }}", id="changes-the-conversation"),
        pytest.param("{{ raise_exception('system role not supported') }}", id="refuses"),
        pytest.param("{% for %}", id="does-not-parse"),
        pytest.param("{{ range(10 ** 9) | list | length }}", id="eats-memory"),
    ],
)
def test_a_hostile_or_refusing_template_is_one_clear_error(template: str) -> None:
    with pytest.raises(BadDataError, match="chat template") as caught:
        Prompting(template, "", "", False).prompt(ASK)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_template_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(BadDataError, match="set chat_template in the model recipe"):
        read_prompting(tmp_path)


def test_many_texts_at_once_are_those_of_one_by_one() -> None:
    template = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not this') }}{% endif %}"
        "[{{ m.content }}]{% endfor %}"
    )
    prompting = Prompting(template, "<s>", "</s>", add_bos=True)
    texts = ["a", "no", "b" * 900_000, "c", "d" * 900_000, "e"]
    conversations = [[{"role": "user", "content": text}] for text in texts]
    found = prompting.examples(conversations, "yes")
    assert isinstance(found[1], BadDataError)
    assert "not this" in str(found[1])
    for place in (0, 2, 3, 4, 5):
        alone = conversations[place]
        assert found[place] == (prompting.prompt(alone), prompting.completion(alone, "yes"))

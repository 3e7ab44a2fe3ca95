"""A small SentencePiece tokenizer as Hugging Face 4 saved it, for the tests of several folders."""

from __future__ import annotations

import io
import random
from typing import Any

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
WORDS = ("parse", "read", "write", "list", "file", "text", "value", "error", "return", "the", "of", "module")


def sentencepiece_model() -> bytes:
    import sentencepiece

    chance = random.Random(1)
    lines = [" ".join(chance.choices(WORDS, k=8)) + chance.choice(["", ".", "\n  x"]) for _ in range(600)]
    result = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=result,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=SPECIAL[3:],
        pad_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return result.getvalue()


def tokenizer_config() -> dict[str, Any]:
    common = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(n): {"content": text, **common} for n, text in enumerate(SPECIAL)},
    }

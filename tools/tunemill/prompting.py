"""How a conversation becomes the exact text a model reads, the same in every stage.

Training, conversion, inference and evaluation all render through this module, with the chat
template the base model came with. A rendered text holds every special token it needs, BOS
included exactly once, so it is always tokenized with ``add_special_tokens=False`` (transformers)
or ``add_special=False, parse_special=True`` (llama.cpp). Templates are untrusted: they run in
Jinja's immutable sandbox, as in transformers, and in a child process with bounds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tunemill.errors import BadDataError
from tunemill.files import MAX_TOKENIZER, read_object, write_json
from tunemill.rendering import render

FILE = "prompting.json"
MAX_TEMPLATE = 1 << 20  # bytes; the longest in use have some 20 kB
Message = Mapping[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``."""


@dataclass(frozen=True)
class Prompting:
    """The template and special tokens of one model."""

    chat_template: str
    """Jinja source."""
    bos_token: str
    """Text of the beginning-of-sequence token, or empty."""
    eos_token: str
    """Text of the end-of-sequence token, which ends a completion unless the template does."""
    add_bos: bool
    """The tokenizer begins every text with BOS; true also where the template writes it."""

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text up to where the assistant's answer begins.

        Raises:
            BadDataError: the template refuses the messages or tries what the sandbox forbids.
        """
        text = self.prompts([messages])[0]
        if isinstance(text, BadDataError):
            raise text
        return text

    def prompts(self, conversations: Sequence[Sequence[Message]]) -> list[str | BadDataError]:
        """Return the prompt of each conversation, or why the template refuses it."""
        texts = render(self.chat_template, [self._variables(each, True) for each in conversations])
        return [text if isinstance(text, BadDataError) else self._with_bos(text) for text in texts]

    def completion(self, messages: Sequence[Message], answer: str) -> str:
        """Return the text after ``prompt(messages)`` when the assistant says ``answer``.

        The answer is rendered by the template where the conversation's text continues the
        prompt's; else (templates that rewrite earlier turns) it is the answer and EOS.
        """
        found = self.examples([messages], answer)[0]
        if isinstance(found, BadDataError):
            raise found
        return found[1]

    def examples(
        self, conversations: Sequence[Sequence[Message]], answer: str
    ) -> list[tuple[str, str] | BadDataError]:
        """Return each conversation's prompt and completion, or why the template refuses it."""
        variables = [
            self._variables(shown, not answered)
            for messages in conversations
            for answered, shown in enumerate(
                (messages, [*messages, {"role": "assistant", "content": answer}])
            )
        ]
        texts = iter(render(self.chat_template, variables))
        return [self._example(prompt, whole, answer) for prompt, whole in zip(texts, texts, strict=True)]

    def _example(
        self, prompt: str | BadDataError, whole: str | BadDataError, answer: str
    ) -> tuple[str, str] | BadDataError:
        if isinstance(prompt, BadDataError):
            return prompt
        if isinstance(whole, BadDataError):
            return whole
        prompt, whole = self._with_bos(prompt), self._with_bos(whole)
        return prompt, self._rest(prompt, whole, answer)

    def _rest(self, prompt: str, whole: str, answer: str) -> str:
        rest = whole[len(prompt) :].rstrip("\n") if whole.startswith(prompt) else ""
        if answer.strip() not in rest:
            rest = answer
        if self.eos_token and rest.endswith(answer):
            rest += self.eos_token  # nothing of the template's ends the turn
        return rest

    def save(self, directory: Path) -> None:
        """Write ``prompting.json`` for the stages that come after."""
        write_json(directory / FILE, asdict(self))

    def _with_bos(self, text: str) -> str:
        if not self.add_bos or not self.bos_token or text.startswith(self.bos_token):
            return text
        return self.bos_token + text

    def _variables(self, messages: Sequence[Message], add_generation_prompt: bool) -> dict[str, Any]:
        return {
            "messages": [dict(message) for message in messages],
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }


def read_prompting(directory: Path) -> Prompting:
    """Read how a model is prompted from ``prompting.json`` or its Hugging Face files.

    The template comes from ``chat_template.jinja`` or ``tokenizer_config.json``; whether BOS is
    added, from ``add_bos_token`` there, else from the post-processor in ``tokenizer.json``.

    Raises:
        BadDataError: the files are malformed, or the model has no chat template.
    """
    if (directory / FILE).exists():
        return _saved(directory / FILE)
    config = read_object(directory / "tokenizer_config.json")
    bos, eos = _token_text(config.get("bos_token")), _token_text(config.get("eos_token"))
    return Prompting(_chat_template(directory, config), bos, eos, _adds_bos(directory, config, bos))


def _saved(path: Path) -> Prompting:
    record = read_object(path)
    types = {field.name: bool if field.name == "add_bos" else str for field in fields(Prompting)}
    if {name: type(value) for name, value in record.items()} != types:
        raise BadDataError(f"{path} is not a prompting record: it needs {', '.join(types)}, each of its type")
    return Prompting(**record)


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str:
    template = config.get("chat_template")
    if (file := directory / "chat_template.jinja").exists():
        template = _text(file)
    if isinstance(template, list):  # older files name several; "default" is the chat one
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = {str(entry.get("name")): entry.get("template") for entry in entries}.get("default")
    if not template:
        raise BadDataError(
            f"{directory.name} has no chat template: set chat_template in the model recipe "
            "(its instruct variant shows which)"
        )
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
        raise BadDataError(f"the chat template in {directory} is no text of at most {MAX_TEMPLATE >> 20} MiB")
    return template


def _text(path: Path) -> str:
    try:
        with path.open("rb") as source:
            return source.read(MAX_TEMPLATE + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise BadDataError(f"{path} cannot be read: {error}") from error


def _adds_bos(directory: Path, config: Mapping[str, Any], bos: str) -> bool:
    if not bos:
        return False
    if isinstance(config.get("add_bos_token"), bool):
        return bool(config["add_bos_token"])
    if not (directory / "tokenizer.json").exists():
        return True  # a bare SentencePiece model: Llama's and Gemma's add it
    processor = read_object(directory / "tokenizer.json", MAX_TOKENIZER).get("post_processor") or {}
    return bos in json.dumps(processor, ensure_ascii=False)


def _token_text(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")

"""How a conversation becomes the exact text a model reads, the same in every stage.

Training, conversion, inference and evaluation all render through this module, with the chat
template the base model came with. A rendered text holds every special token it needs, BOS
included exactly once, so it is always tokenized with ``add_special_tokens=False`` (transformers)
or ``add_special=False, parse_special=True`` (llama.cpp). Templates are untrusted: they run in
Jinja's immutable sandbox, as in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from tunemill.errors import BadDataError
from tunemill.files import write_json

FILE = "prompting.json"
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
        return self._with_bos(self._render(messages, add_generation_prompt=True))

    def completion(self, messages: Sequence[Message], answer: str) -> str:
        """Return the text after ``prompt(messages)`` when the assistant says ``answer``.

        The answer is rendered by the template where the conversation's text continues the
        prompt's; else (templates that rewrite earlier turns) it is the answer and EOS.
        """
        prompt = self.prompt(messages)
        whole = self._with_bos(
            self._render([*messages, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        )
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

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        from jinja2.exceptions import TemplateError

        try:
            template = _compile(self.chat_template)
            text: str = template.render(
                messages=[dict(message) for message in messages],
                bos_token=self.bos_token,
                eos_token=self.eos_token,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
            )
            return text
        except (TemplateError, TypeError, ValueError, OverflowError) as error:
            raise BadDataError(f"the chat template cannot render this conversation: {error}") from error


def read_prompting(directory: Path) -> Prompting:
    """Read how a model is prompted from ``prompting.json`` or its Hugging Face files.

    The template comes from ``chat_template.jinja`` or ``tokenizer_config.json``; whether BOS is
    added, from ``add_bos_token`` there, else from the post-processor in ``tokenizer.json``.

    Raises:
        BadDataError: the files are malformed, or the model has no chat template.
    """
    saved = directory / FILE
    if saved.exists():
        try:
            return Prompting(**_json(saved))
        except TypeError as error:
            raise BadDataError(f"{saved} is not a prompting record: {error}") from error
    config = _json(directory / "tokenizer_config.json")
    bos, eos = _token_text(config.get("bos_token")), _token_text(config.get("eos_token"))
    return Prompting(_chat_template(directory, config), bos, eos, _adds_bos(directory, config, bos))


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str:
    file = directory / "chat_template.jinja"
    template = file.read_text("utf-8") if file.exists() else config.get("chat_template")
    if isinstance(template, list):  # older files name several; "default" is the chat one
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not template:
        raise BadDataError(
            f"{directory.name} has no chat template: set chat_template in the model recipe "
            "(its instruct variant shows which)"
        )
    return str(template)


def _adds_bos(directory: Path, config: Mapping[str, Any], bos: str) -> bool:
    if not bos:
        return False
    if isinstance(config.get("add_bos_token"), bool):
        return bool(config["add_bos_token"])
    if not (directory / "tokenizer.json").exists():
        return True  # a bare SentencePiece model: Llama's and Gemma's add it
    processor = _json(directory / "tokenizer.json").get("post_processor") or {}
    return bos in json.dumps(processor, ensure_ascii=False)


def _token_text(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadDataError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise BadDataError(f"{path} holds no JSON object")
    return value


@lru_cache(maxsize=8)
def _compile(source: str) -> Any:
    """Compile a template with the settings and functions that transformers gives it."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    def strftime_now(pattern: str) -> str:
        return DATE.strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment.from_string(source)


DATE = datetime(2024, 7, 26, tzinfo=UTC)
"""The day that templates are told it is (Llama 3.2's own default): a prompt that changes with
the calendar could not be reproduced."""

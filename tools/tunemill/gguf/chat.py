"""What others make of a GGUF's chat template, within the child process that loads llama.cpp.

Tunemill renders prompts itself, from the record that goes with the file. Whoever runs the file with
something else takes the template that is in it: llama-cpp-python by a Jinja of its own, programs on
llama.cpp's C interface by a formatter that knows some templates by their look.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from tunemill.rendering import DATE

ROOM = 1 << 20  # bytes of one rendered conversation


def chat(llama_cpp: Any, model: Any, conversations: Sequence[Sequence[Mapping[str, str]]]) -> dict[str, Any]:
    """Return the template's texts by both, and the special tokens they are rendered with.

    ``jinja`` has a text, or ``{"error": reason}``, for each conversation; ``built_in`` texts, or None
    where llama.cpp does not know the template.
    """
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    template = llama_cpp.llama_model_chat_template(model, None)
    bos, eos = (
        _text(llama_cpp, vocabulary, getattr(llama_cpp, f"llama_vocab_{name}")(vocabulary))
        for name in ("bos", "eos")
    )
    if template is None:
        return {"template": None, "bos": bos, "eos": eos, "jinja": [], "built_in": []}
    return {
        "template": template.decode(),
        "bos": bos,
        "eos": eos,
        "jinja": [_jinja(template.decode(), bos, eos, messages) for messages in conversations],
        "built_in": [_built_in(llama_cpp, template, messages) for messages in conversations],
    }


def _jinja(template: str, bos: str, eos: str, messages: Sequence[Mapping[str, str]]) -> str | dict[str, str]:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    class Formatter(Jinja2ChatFormatter):  # type: ignore[misc]
        @staticmethod
        def strftime_now(f: str) -> str:
            return DATE.strftime(f)  # else the day it is run on would be the difference

    try:
        text: str = Formatter(template, eos_token=eos, bos_token=bos)(messages=list(messages)).prompt
    except Exception as error:  # noqa: BLE001 - the template's own refusal may be of any class
        return {"error": str(error)[:200]}
    return text


def _built_in(llama_cpp: Any, template: bytes, messages: Sequence[Mapping[str, str]]) -> str | None:
    entries = [
        llama_cpp.llama_chat_message(role=message["role"].encode(), content=message["content"].encode())
        for message in messages
    ]
    array = (llama_cpp.llama_chat_message * len(entries))(*entries)
    buffer = ctypes.create_string_buffer(ROOM)
    count = llama_cpp.llama_chat_apply_template(template, array, len(entries), True, buffer, ROOM)
    return buffer.raw[:count].decode("utf-8", "replace") if 0 <= count <= ROOM else None


def _text(llama_cpp: Any, vocabulary: Any, token: int) -> str:
    return str(llama_cpp.llama_vocab_get_text(vocabulary, token).decode()) if token >= 0 else ""

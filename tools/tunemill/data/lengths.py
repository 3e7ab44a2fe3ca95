"""Counts tokens of prompts and completions under the base model's own tokenizer and template.

Texts are rendered by ``Prompting`` and tokenized apart, without added special tokens: exactly
what training and inference do with them. No remote code is run for a tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunemill.data.examples import Example
from tunemill.errors import BadDataError
from tunemill.progress import Progress
from tunemill.prompting import Prompting

BATCH = 512


def count_tokens(
    examples: Sequence[Example], prompting: Prompting, tokenizer: Any, progress: Progress
) -> Any:
    """Return the tokens of every example's prompt and completion, in order: int32 ``(examples, 2)``.

    Raises:
        BadDataError: the chat template refuses a conversation; names the row.
    """
    import numpy

    lengths = numpy.empty((len(examples), 2), dtype=numpy.int32)
    with progress.task("count tokens", len(examples), "examples") as task:
        for start in range(0, len(examples), BATCH):
            texts = [_render(example, prompting) for example in examples[start : start + BATCH]]
            for part, column in enumerate(zip(*texts, strict=True)):
                lengths[start : start + BATCH, part] = _count(tokenizer, column)
            task.advance(len(texts))
    return lengths


def special_texts(examples: Sequence[Example], tokenizer: Any) -> list[tuple[str, str]]:
    """Return id and token for examples whose own text spells a special token.

    Such a text would become control tokens in the prompt: an end of turn, say.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {str(token) for token in tokenizer.all_special_tokens}
    tokens |= {str(token) for token in added if token.special}
    ordered = sorted(token for token in tokens if token.strip())
    found = []
    for example in examples:
        texts = "\n".join([example.completion, *(message["content"] for message in example.prompt)])
        found += [(example.id, token) for token in ordered if token in texts][:1]
    return found


def _render(example: Example, prompting: Prompting) -> tuple[str, str]:
    try:
        return prompting.prompt(example.prompt), prompting.completion(example.prompt, example.completion)
    except BadDataError as error:
        raise BadDataError(f"{example.where}: {error}") from error


def _count(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]

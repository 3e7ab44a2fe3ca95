"""From a row to token ids: the prompt, and the labels' completions as one tree.

Prompt and completion are tokenized apart and put together, as in training. Most templates render
the same completion whatever the conversation was; where one does not, the row gets a tree of its
own, so scores are always those of the exact text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunemill.errors import BadDataError
from tunemill.infer.classify import Question
from tunemill.infer.engine import MOST_SEQUENCES
from tunemill.infer.model import Model
from tunemill.infer.rows import Row
from tunemill.infer.sequences import Sequences
from tunemill.infer.trie import Trie, build_tries
from tunemill.prompting import Message, Prompting
from tunemill.task import Task


@dataclass(frozen=True)
class Refused:
    """Why a row cannot be asked; the words before a colon name the kind of reason."""

    reason: str


@dataclass(frozen=True)
class _Labels:
    texts: tuple[str, ...]
    tries: tuple[Trie, ...]
    longest: int
    """Tokens of the longest answer."""
    sequences: Sequences | None = None
    """Where an answer may have several labels; the tries are then of single ones."""


class Asker:
    """Turns rows into questions for one model and one task."""

    def __init__(
        self, model: Model, prompting: Prompting, task: Task, longest: int, max_new_tokens: int
    ) -> None:
        self._model = model
        self._prompting = prompting
        self._task = task
        self._labels = task.labels
        self._most = longest
        self._max_new_tokens = max_new_tokens
        self._known: dict[tuple[str, ...], _Labels] = {}

    def ask(self, rows: Sequence[Row]) -> list[Question | Refused]:
        """Return for each row what to compute, or why it cannot be."""
        told = iter(self._rendered([row.messages for row in rows if row.text.strip()]))
        return [
            self._question(row, next(told)) if row.text.strip() else Refused("empty text") for row in rows
        ]

    def prompt(self, row: Row) -> str:
        """Return a row's prompt as the model reads it, or its messages where that is refused."""
        text = self._prompting.prompts([row.messages])[0]
        return "\n".join(one["content"] for one in row.messages) if isinstance(text, BadDataError) else text

    def _rendered(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[str, str] | BadDataError]:
        """Return each prompt with the completion of the first label; without labels, with none."""
        if self._labels:
            return self._prompting.examples(conversations, self._labels[0])
        return [
            prompt if isinstance(prompt, BadDataError) else (prompt, "")
            for prompt in self._prompting.prompts(conversations)
        ]

    def _question(self, row: Row, rendered: tuple[str, str] | BadDataError) -> Question | Refused:
        try:
            if isinstance(rendered, BadDataError):
                raise rendered
            labels = self._completions(row.messages, rendered[1]) if self._labels else None
        except BadDataError as error:
            return Refused(f"not rendered: {error}")
        prompt = self._model.tokens(rendered[0])
        if not prompt:
            return Refused("empty prompt")
        answer = labels.longest if labels else self._max_new_tokens
        if len(prompt) + answer > self._most:
            return Refused(
                f"too long: {len(prompt)} tokens of prompt and {answer} of answer, at most {self._most}"
            )
        return Question(prompt, labels.tries, labels.sequences) if labels else Question(prompt, ())

    def _completions(self, messages: Sequence[Message], first: str) -> _Labels:
        """Return the labels' completions; ``first`` is the first label's after these messages."""
        roles = tuple(message["role"] for message in messages)
        known = self._known.get(roles)
        if known is None:
            known = self._known[roles] = self._build(messages)
        return known if first == known.texts[0] else self._build(messages)

    def _build(self, messages: Sequence[Message]) -> _Labels:
        texts = tuple(self._prompting.completion(messages, label) for label in self._labels)
        tokens = [self._model.tokens(text) for text in texts]
        for label, ids in zip(self._labels, tokens, strict=True):
            if not ids:
                raise BadDataError(f"the label {label!r} has no tokens in this model's vocabulary")
        tries = build_tries(tokens, MOST_SEQUENCES)
        if self._task.form != "labels":
            return _Labels(texts, tries, max(map(len, tokens)))
        sequences = Sequences(
            lambda answer: self._model.tokens(self._prompting.completion(messages, answer)), self._task
        )
        return _Labels(texts, tries, sequences.longest, sequences)

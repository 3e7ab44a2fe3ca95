"""Answers of several labels as token ids: each one is a whole completion, tokenized as in training.

An answer is a sequence of different labels, joined. How it goes on after some of its labels is bounded
by its *stem*: the tokens that all completions beginning with these labels have in common. No completion
is the beginning of another, since each ends the turn, so their probabilities together are at most the
stem's. That a beginning is tokenized alike whatever follows it is what training relies on too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile

from tunemill.infer.trie import Trie, build_tries
from tunemill.task import Task

NODES = 256
"""Tokens of answers that are in memory beside a prompt, unless one answer alone has more."""
REMEMBERED = 1024  # levels kept: texts of one kind go on after the same few labels

Chosen = tuple[int, ...]
"""Positions of an answer's labels in the task's list."""


@dataclass(frozen=True)
class Level:
    """What is scored at once: answers, and the stems of those that may go on."""

    answers: tuple[Chosen, ...]
    beginnings: tuple[Chosen, ...]
    """Those of the answers that have fewer labels than allowed."""
    tries: tuple[Trie, ...]
    """The answers, then the beginnings' stems, in that order."""

    @property
    def scored(self) -> int:
        """Scores that the tries give."""
        return len(self.answers) + len(self.beginnings)


class Sequences:
    """The answers that a task allows, under one rendering; ``tokens`` are those of an answer's text."""

    def __init__(self, tokens: Callable[[str], tuple[int, ...]], task: Task) -> None:
        self._task = task
        self._text_tokens = tokens
        self._tokens = lru_cache(maxsize=None)(self._read)
        self.after = lru_cache(maxsize=REMEMBERED)(self._level)
        """Return the level of all answers that are one of the given ones and one label more."""

    @property
    def longest(self) -> int:
        """Tokens of the longest answer, or nearly so: of the longest labels joined."""
        labels = range(len(self._task.labels))
        ordered = sorted(labels, key=lambda label: (-len(self._tokens((label,))), label))
        return len(self._tokens(tuple(ordered[: self._task.max_labels])))

    def text(self, chosen: Chosen) -> str:
        """Return an answer as the model writes it."""
        return self._task.separator.join(self._task.labels[label] for label in chosen)

    def _level(self, beginnings: tuple[Chosen, ...]) -> Level:
        answers = tuple(longer for chosen in beginnings for longer in self._longer(chosen))
        going_on = tuple(chosen for chosen in answers if len(chosen) < self._task.max_labels)
        scored = [*map(self._tokens, answers), *map(self._stem, going_on)]
        return Level(answers, going_on, build_tries(scored, max(1, NODES // max(map(len, scored)))))

    def _longer(self, chosen: Chosen) -> list[Chosen]:
        return [(*chosen, label) for label in range(len(self._task.labels)) if label not in chosen]

    def _stem(self, chosen: Chosen) -> tuple[int, ...]:
        longer = sorted(self._tokens(longer) for longer in self._longer(chosen))
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(longer[0], longer[-1], strict=False))
        return tuple(token for token, _ in alike)

    def _read(self, chosen: Chosen) -> tuple[int, ...]:
        return self._text_tokens(self.text(chosen))

"""A probe set over a vocabulary of eight tokens, and a model that is a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tunemill.parity.measure import measure
from tunemill.parity.probes import Probes, Rendering, choose
from tunemill.prompting import Prompting

WORDS = ("<s>", "</s>", "a", "b", "c", "yes", "no", "maybe")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
PROMPTING = Prompting(TEMPLATE, "<s>", "</s>", add_bos=True)
LABELS = ("yes", "no", "maybe a")


def tokenize(texts: Sequence[str]) -> list[list[int]]:
    """Greedy, by the longest word."""
    found = []
    for text in texts:
        ids = []
        while text:
            word = max((word for word in WORDS if text.startswith(word)), key=len, default=" ")
            text = text[len(word) :]
            if word != " ":
                ids.append(WORDS.index(word))
        found.append(ids)
    return found


def rows(count: int) -> list[dict]:
    letters = "abcbacab"
    return [
        {
            "id": f"r{n}",
            "prompt": [{"role": "user", "content": " ".join(letters[n % 5 : n % 5 + 1 + n % 4])}],
            "completion": LABELS[n % 3],
        }
        for n in range(count)
    ]


class Table:
    """Each token's logits depend on the one before, by a table."""

    def __init__(self, table) -> None:
        self.table = table
        self.asked = 0

    def read(self, tokens, wanted):
        return self.table[[tokens[place] for place in wanted]]

    def go_on(self, texts):
        self.asked += len(texts)
        return [self.table[list(text)] for text in texts]


@pytest.fixture
def table():
    return np.random.default_rng(3).normal(0, 2, (len(WORDS), len(WORDS))).astype(np.float32)


@pytest.fixture
def rendering() -> Rendering:
    return Rendering(PROMPTING, tokenize, len(WORDS))


@pytest.fixture
def probes(rendering) -> Probes:
    return choose(rows(40), "validation", LABELS, rendering, 12)


@pytest.fixture
def answers(probes):
    """``answers(table)``: what the model of a table answers."""
    return lambda table: measure(Table(table), probes)

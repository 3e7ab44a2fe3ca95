"""Free answers: tokens one by one, many texts at once.

A group of texts shares one memory; whenever an answer ends, the next text takes its place. Groups
and places are fixed by the rows' order, so the same rows are always computed together. The n-th
row's random numbers come from ``(seed, n)`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tunemill.infer.engine import Batch, Engine, join, run_of
from tunemill.infer.model import Model
from tunemill.infer.pool import Pool

GROUP = 64  # texts per task
PLACES = 16  # texts computed at once within a task


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when an answer ends at the latest."""

    max_new_tokens: int
    temperature: float
    """0 for the likeliest token."""
    seed: int


@dataclass(frozen=True)
class Prompt:
    """One prompt to continue."""

    number: int
    """The row's place in the whole split, which with the seed decides its random numbers."""
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Continuation:
    """A free answer."""

    text: str
    """Without special tokens and surrounding space."""
    ended: bool
    """The model ended the answer itself, before ``max_new_tokens``."""


def generate(
    pool: Pool, model: Model, prompts: Sequence[Prompt], sampling: Sampling
) -> Iterator[Continuation]:
    """Yield each prompt's continuation, in order."""
    groups = [prompts[start : start + GROUP] for start in range(0, len(prompts), GROUP)]
    for answers in pool.each(lambda engine, group: _group(engine, model, group, sampling), groups):
        yield from answers


def cells(prompts: Sequence[Prompt], sampling: Sampling) -> int:
    """Return how many tokens llama.cpp has to remember to answer any group of these prompts."""
    longest = sorted((len(prompt.tokens) for prompt in prompts), reverse=True)[:PLACES]
    return sum(longest) + len(longest) * sampling.max_new_tokens


@dataclass
class _Place:
    """An answer being made in one sequence."""

    index: int
    sequence: int
    pending: tuple[int, ...]
    """Tokens not computed yet: the rest of the prompt, then always the newest token."""
    position: int
    """Where ``pending`` begins in the text."""
    random: np.random.Generator
    answer: list[int] = field(default_factory=list)


def _group(engine: Engine, model: Model, prompts: Sequence[Prompt], sampling: Sampling) -> list[Continuation]:
    answers: dict[int, Continuation] = {}
    waiting = list(range(len(prompts)))[::-1]
    places: list[_Place] = []
    free = list(range(PLACES))[::-1]
    while waiting or places:
        while waiting and free:
            index = waiting.pop()
            places.append(_place(engine, index, prompts[index], free.pop(), sampling.seed))
        logits = engine.decode(_batch(places))
        running = []
        for place, row in zip(places, logits, strict=True):
            token = _choose(row, sampling.temperature, place.random)
            ended = model.ends_turn(token)
            if not ended:
                place.answer.append(token)
            if ended or len(place.answer) == sampling.max_new_tokens:
                answers[place.index] = Continuation(model.text(place.answer).strip(), ended)
                engine.forget_sequence(place.sequence)
                free.append(place.sequence)
            else:
                place.position += len(place.pending)
                place.pending = (token,)
                running.append(place)
        places = running
    engine.forget()
    return [answers[index] for index in range(len(prompts))]


def _place(engine: Engine, index: int, prompt: Prompt, sequence: int, seed: int) -> _Place:
    random = np.random.Generator(np.random.PCG64([seed, prompt.number]))
    return _Place(index, sequence, prompt.tokens[engine.shared :], engine.shared, random)


def _batch(places: Sequence[_Place]) -> Batch:
    return join(
        run_of(place.pending, place.position, (place.sequence,), output_last=True) for place in places
    )


def _choose(logits: npt.NDArray[np.float32], temperature: float, random: np.random.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    heights = np.cumsum(weights)
    return int(np.searchsorted(heights, random.random() * heights[-1], side="right"))

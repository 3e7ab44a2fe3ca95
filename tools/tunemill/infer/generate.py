"""Free answers: tokens one by one, many texts at once.

A group of texts shares one memory; whenever answers end, the next text takes their places. Groups, places
and the order of everything computed are fixed by the rows' order, so the same rows are always computed
together, in the same cells of memory: threads, batches and interruptions change no bit. The random numbers
of a row's sample come from ``(seed, row, sample)`` alone.

A text's samples share its prompt, which is computed once. Where a grammar holds the answers to a form, the
token that would be chosen is asked about first; one that is refused is as if it were not in the vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tunemill.infer.engine import Batch, Engine, Logits, join, run_of
from tunemill.infer.grammar import Grammar, State
from tunemill.infer.model import Model
from tunemill.infer.pool import Pool

GROUP = 64  # texts per task
PLACES = 16  # answers computed at once within a task, but always all samples of a text
REFUSALS = 32  # tokens asked about one by one before the whole vocabulary is, which costs milliseconds

CUT_OFF = "cut off: not whole within the tokens that max_new_tokens allows"
BROKEN = "broken: its bytes are no UTF-8"
STUCK = "stuck: no token of the vocabulary goes on as the grammar wants"

Row = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when an answer ends at the latest."""

    max_new_tokens: int
    temperature: float
    """0 for the likeliest token."""
    seed: int
    top_k: int = 0
    """Draw from so many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this share."""
    min_p: float = 0.0
    """Draw from tokens that are at least this likely, as a share of the likeliest."""
    samples: int = 1
    """Answers to each prompt."""
    stop: tuple[bytes, ...] = ()
    """What ends an answer without being part of it."""


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
    """As the model spelled it, without special tokens and what ``stop`` cut off."""
    ended: bool
    """The model ended the answer itself, before ``max_new_tokens``."""
    logprob: float
    """Nats of all its tokens, the one that ended it included, as the model weighs them: before temperature,
    grammar and the like."""
    error: str | None = None
    """Why it is not as the grammar wants: cut off before it was whole, or no token could follow."""


def generate(
    pool: Pool,
    model: Model,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    grammar: Grammar | None = None,
) -> Iterator[tuple[Continuation, ...]]:
    """Yield the samples of each prompt's continuation, in order."""
    groups = [prompts[start : start + GROUP] for start in range(0, len(prompts), GROUP)]

    def answer(engine: Engine, group: Sequence[Prompt]) -> list[tuple[Continuation, ...]]:
        return _Group(engine, model, sampling, grammar).answers(group)

    for answers in pool.each(answer, groups):
        yield from answers


def cells(prompts: Sequence[Prompt], sampling: Sampling) -> int:
    """Return how many tokens llama.cpp has to remember to answer any group of these prompts."""
    rows = max(PLACES // sampling.samples, 1)
    longest = sorted((len(prompt.tokens) for prompt in prompts), reverse=True)[:rows]
    return sum(longest) + len(longest) * sampling.samples * sampling.max_new_tokens


@dataclass
class _Place:
    """An answer being made in one sequence."""

    index: int
    """Which prompt of the group."""
    sample: int
    sequence: int
    start: int
    """Where its first token stands in the text."""
    random: np.random.Generator
    state: State | None
    token: int = -1
    """The newest, which is not computed yet."""
    count: int = 0
    """Tokens of the answer."""
    spelled: bytes = b""
    logprob: float = 0.0


class _Group:
    """Some prompts answered in one engine."""

    def __init__(self, engine: Engine, model: Model, sampling: Sampling, grammar: Grammar | None) -> None:
        self._engine = engine
        self._model = model
        self._sampling = sampling
        self._grammar = grammar
        self._places: dict[int, _Place] = {}
        self._found: dict[tuple[int, int], Continuation] = {}

    def answers(self, prompts: Sequence[Prompt]) -> list[tuple[Continuation, ...]]:
        """Return the samples of each prompt."""
        samples = range(self._sampling.samples)
        waiting = deque(enumerate(prompts))
        free = list(range(max(PLACES, len(samples))))[::-1]
        try:
            while waiting or self._places:
                before = list(self._places.values())
                begun = []
                while waiting and len(free) >= len(samples):
                    index, prompt = waiting.popleft()
                    places = [self._begin(index, sample, prompt, free.pop()) for sample in samples]
                    begun.append((prompt, places))
                free += self._step(before, begun)
            self._engine.forget()
        finally:
            for sequence in list(self._places):
                self._leave(sequence)
        return [tuple(self._found[index, sample] for sample in samples) for index in range(len(prompts))]

    def _begin(self, index: int, sample: int, prompt: Prompt, sequence: int) -> _Place:
        random = np.random.Generator(np.random.PCG64([self._sampling.seed, prompt.number, sample]))
        state = self._grammar.start() if self._grammar else None
        place = _Place(index, sample, sequence, len(prompt.tokens), random, state)
        self._places[sequence] = place
        return place

    def _step(self, before: Sequence[_Place], begun: Sequence[tuple[Prompt, list[_Place]]]) -> list[int]:
        """Give every place its next token; return the sequences of the answers that are done."""
        start = self._engine.shared
        batches = [_newest(before)] if before else []
        for prompt, places in begun:
            members = [place.sequence for place in places]
            batches.append(run_of(prompt.tokens[start:], start, members, output_last=True))
        logits = self._engine.decode(join(batches))
        likeliest, normalisers = logits.argmax(axis=1), _normalisers(logits)
        done = []
        for row, places in enumerate([*([place] for place in before), *(places for _, places in begun)]):
            for place in places:
                token = self._choose(place, logits[row], int(likeliest[row]))
                if token is not None:
                    place.logprob += float(logits[row, token] - normalisers[row])
                if self._ends(place, token):
                    done.append(place.sequence)
        for sequence in done:
            self._leave(sequence)
            self._engine.forget_sequence(sequence)
        return done

    def _choose(self, place: _Place, logits: Row, likeliest: int) -> int | None:
        """Return a place's next token; None where the grammar permits none."""
        sampling, state = self._sampling, place.state
        token = draw(logits, sampling, place.random) if sampling.temperature else likeliest
        if state is None or state.permits(token):
            return token
        left = logits.copy()
        for _ in range(REFUSALS):
            left[token] = -np.inf
            token = draw(left, sampling, place.random)
            if state.permits(token):
                return token
        left[~state.permitted()] = -np.inf
        return draw(left, sampling, place.random) if left.max() > -np.inf else None

    def _ends(self, place: _Place, token: int | None) -> bool:
        """Add a token to an answer; tell whether that is its end, and keep it if so."""
        if token is None:
            return self._keep(place, place.spelled, False, STUCK)
        if self._model.ends_turn(token):
            return self._keep(place, place.spelled, True)
        piece = self._model.piece(token)
        place.spelled += piece
        if (end := _stop(place.spelled, len(piece), self._sampling.stop)) >= 0:
            return self._keep(place, place.spelled[:end], True)
        if place.state:
            place.state.accept(token)
        place.token = token
        place.count += 1
        if place.count < self._sampling.max_new_tokens:
            return False
        whole = place.state is None or place.state.may_end()
        return self._keep(place, place.spelled, False, None if whole else CUT_OFF)

    def _keep(self, place: _Place, spelled: bytes, ended: bool, error: str | None = None) -> bool:
        text = spelled.decode(errors="replace")
        if self._grammar and not error and text.encode() != spelled:
            error = BROKEN
        self._found[place.index, place.sample] = Continuation(text, ended, place.logprob, error)
        return True

    def _leave(self, sequence: int) -> None:
        state = self._places.pop(sequence).state
        if state:
            state.close()


def _newest(places: Sequence[_Place]) -> Batch:
    """Make the batch of all places' newest tokens."""
    ones = np.ones(len(places), np.int32)
    return Batch(
        np.array([place.token for place in places], np.int32),
        np.array([place.start + place.count - 1 for place in places], np.int32),
        ones,
        np.array([place.sequence for place in places], np.int32),
        ones.astype(np.int8),
    )


def _stop(spelled: bytes, newest: int, stops: Sequence[bytes]) -> int:
    """Return where the first of ``stops`` begins, if one ends in the ``newest`` bytes; else -1."""
    found = [spelled.find(stop, max(0, len(spelled) - newest - len(stop) + 1)) for stop in stops]
    return min((place for place in found if place >= 0), default=-1)


def _normalisers(logits: Logits) -> npt.NDArray[np.float64]:
    """Return ``(rows,)`` what turns each row's logits into log-probabilities when taken off."""
    peaks = logits.max(axis=1)
    return np.asarray(peaks + np.log(np.exp(logits - peaks[:, None]).sum(axis=1, dtype=np.float64)))


def draw(logits: Row, sampling: Sampling, random: np.random.Generator) -> int:
    """Return the next token: the likeliest at temperature 0, else a random one.

    As in llama.cpp ``top_k``, ``top_p`` and ``min_p`` narrow the choice in this order, each renormalising
    what the one before left, and the temperature comes last.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    tokens = _narrowed(logits, sampling)
    left = logits if tokens is None else logits[tokens]
    heights = np.cumsum(np.exp((left.astype(np.float64) - left.max()) / sampling.temperature))
    chosen = int(np.searchsorted(heights, random.random() * heights[-1], side="right"))
    return chosen if tokens is None else int(tokens[chosen])


def _narrowed(logits: Row, sampling: Sampling) -> npt.NDArray[np.intp] | None:
    """Return the tokens to draw from, the likeliest first; None for all."""
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        return None
    tokens = np.argsort(-logits, kind="stable")[: sampling.top_k or None]
    weights = np.exp(logits[tokens].astype(np.float64) - logits[tokens[0]])
    count = len(tokens)
    if sampling.top_p < 1:
        shares = np.cumsum(weights)
        count = int(np.searchsorted(shares, sampling.top_p * shares[-1])) + 1
    return tokens[: min(count, int((weights >= sampling.min_p).sum()))]

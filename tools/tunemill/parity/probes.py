"""The probe set: real prompts of a task by which a model is recognised from stage to stage.

Train chooses it from the task's own rows and renders it as it renders what it trains on; every stage
after that carries the file on unchanged. So the same texts and token ids are put to the trained model,
the merged one, the GGUF and each quantization, and whatever differs then is the model's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tunemill.errors import BadDataError
from tunemill.files import write_json
from tunemill.prompting import Prompting

FILE = "probes.json"
VERSION = 1
MOST_BYTES = 64 << 20  # of probes.json and of the distributions at its positions, in float16
MOST_POSITIONS = 16  # of one prompt: 64 prompts then say enough of a small model, and fit for a large one

Tokenize = Callable[[Sequence[str]], Sequence[Sequence[int]]]
"""Token ids of texts as they are: nothing added, special tokens recognised."""


@dataclass(frozen=True)
class Text:
    """A text and its token ids, as training read them."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Probe:
    """One prompt with its right answer, and where its distributions are looked at."""

    origin: str
    """``validation row 17``: the split and the row's id."""
    messages: tuple[Mapping[str, str], ...]
    """The conversation before it is rendered."""
    prompt: Text
    answer: Text
    """The right answer as a completion, its end included."""
    labels: tuple[Text, ...]
    """Every label's completion; empty where the task has no labels."""
    label: int | None
    """Which of the labels is right."""
    positions: tuple[int, ...]
    """Ascending places in prompt and answer, from 0, whose next token is predicted."""


@dataclass(frozen=True)
class Probes:
    """All probes, in a fixed order."""

    probes: tuple[Probe, ...]

    @cached_property
    def digest(self) -> str:
        """Sha256 of the set: the same prompts, tokens and positions."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def labels(self) -> int:
        """How many labels the task has."""
        return len(self.probes[0].labels)

    def save(self, directory: Path) -> None:
        """Write ``probes.json``."""
        write_json(directory / FILE, {"version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, directory: Path) -> Probes:
        """Read ``probes.json``.

        Raises:
            BadDataError: it is not what ``save`` writes.
        """
        path = directory / FILE
        try:
            if path.stat().st_size > MOST_BYTES:
                raise ValueError(f"it is larger than {MOST_BYTES} bytes")
            value = json.loads(path.read_text("utf-8"))
            if value["version"] != VERSION:
                raise ValueError(f"its version is {value['version']!r}, not {VERSION}")
            loaded = cls(tuple(_probe(entry) for entry in value["probes"]))
            _check(loaded)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadDataError(f"{path} is no probe set: {error!r}; train again to make one") from error
        return loaded


def _probe(entry: Mapping[str, Any]) -> Probe:
    messages = tuple(
        {"role": str(each["role"]), "content": str(each["content"])} for each in entry["messages"]
    )
    return Probe(
        str(entry["origin"]),
        messages,
        _text(entry["prompt"]),
        _text(entry["answer"]),
        tuple(map(_text, entry["labels"])),
        None if entry["label"] is None else int(entry["label"]),
        tuple(map(int, entry["positions"])),
    )


def _text(entry: Mapping[str, Any]) -> Text:
    return Text(str(entry["text"]), tuple(map(int, entry["tokens"])))


def _check(probes: Probes) -> None:
    """Raise ValueError unless what is computed from the set is well defined."""
    if not probes.probes:
        raise ValueError("it is empty")
    for probe in probes.probes:
        texts = (probe.prompt, probe.answer, *probe.labels)
        last = len(probe.prompt.tokens) + len(probe.answer.tokens) - 1
        if any(not text.tokens or min(text.tokens) < 0 for text in texts):
            raise ValueError(f"{probe.origin} has a text without tokens")
        if len(probe.labels) != probes.labels or (probe.label or 0) not in range(max(1, probes.labels)):
            raise ValueError(f"{probe.origin} has other labels than the first probe")
        ascending = all(a < b for a, b in zip(probe.positions, probe.positions[1:], strict=False))
        if not probe.positions or not ascending or probe.positions[0] < 0 or probe.positions[-1] >= last:
            raise ValueError(f"{probe.origin} is looked at where it has no next token")


@dataclass(frozen=True)
class Rendering:
    """How a model is asked: its template and its tokenizer."""

    prompting: Prompting
    tokenize: Tokenize
    vocabulary: int
    """Tokens there are."""


def choose(
    rows: Sequence[Mapping[str, Any]], split: str, labels: Sequence[str], rendering: Rendering, count: int
) -> Probes:
    """Choose ``count`` rows of a split and render them; the same rows give the same set.

    Rows are ordered by the sha256 of their ids, so the choice follows no order of the data. ``labels``
    are the names a task allows, empty for free answers.

    Raises:
        BadDataError: a prompt begins with BOS twice, as no model was pretrained.
    """
    chosen = sorted(rows, key=lambda row: hashlib.sha256(str(row["id"]).encode()).digest())[:count]
    most = MOST_BYTES // (2 * rendering.vocabulary * len(chosen))
    places = max(1, min(MOST_POSITIONS, most))
    probes = Probes(tuple(_render(row, split, labels, rendering, places) for row in chosen))
    _refuse_doubled_bos(probes, rendering.prompting)
    return probes


def _render(
    row: Mapping[str, Any], split: str, labels: Sequence[str], rendering: Rendering, places: int
) -> Probe:
    messages, prompting = row["prompt"], rendering.prompting
    completions = [prompting.completion(messages, name) for name in (row["completion"], *labels)]
    texts = [prompting.prompt(messages), *completions]
    prompt, answer, *others = (
        Text(text, tuple(ids)) for text, ids in zip(texts, rendering.tokenize(texts), strict=True)
    )
    right = labels.index(row["completion"]) if row["completion"] in labels else None
    if right is None:
        others = []
    positions = spread(len(prompt.tokens), len(answer.tokens), places)
    kept = tuple({"role": each["role"], "content": each["content"]} for each in messages)
    return Probe(f"{split} row {row['id']}", kept, prompt, answer, tuple(others), right, positions)


def spread(prompt: int, answer: int, places: int) -> tuple[int, ...]:
    """Return up to ``places`` positions of a text of ``prompt`` and ``answer`` tokens.

    The first half of them predict the answer from its beginning, where fine-tuning changed most; the
    others lie evenly in the prompt, where a model is less sure and so shows small differences sooner.
    """
    first = prompt - 1
    of_answer = range(first, first + min(answer, -(-places // 2)))
    before = min(first, places - len(of_answer))
    of_prompt = [first * number // before for number in range(before)]
    return (*of_prompt, *of_answer)


def _refuse_doubled_bos(probes: Probes, prompting: Prompting) -> None:
    bos = prompting.bos_token
    for probe in probes.probes:
        if bos and probe.prompt.text.startswith(bos + bos):
            raise BadDataError(
                f"{probe.origin} begins with {bos} twice: the chat template writes what the tokenizer adds; "
                "set chat_template in the model recipe to one that writes it once"
            )

"""Proves on real prompts that llama.cpp reads the same tokens as the model was trained on.

A doubled BOS, a lost prefix space or an unrecognised special token costs accuracy and raises no
error anywhere. So after conversion the prompts and completions of the task are tokenized in both
engines exactly as train and infer feed them: apart from each other, with nothing added, special
tokens recognised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from tunemill.errors import BadDataError
from tunemill.files import write_json
from tunemill.gguf.library import Library
from tunemill.prompting import Prompting
from tunemill.tokenizer import load_tokenizer
from tunemill.work import Facts

ROWS = 200  # both engines together take under a second for these
ODD = 60  # of them: the longest, the shortest and those with the rarest characters
SPLITS = ("train", "validation", "test")
FILE = "tokens.json"


Row = TypeVar("Row")


@dataclass(frozen=True)
class Probe:
    """One text and where it comes from."""

    origin: str
    """``test row 17, prompt``."""
    text: str


@dataclass(frozen=True)
class Expected:
    """What a model's own tokenizer makes of texts of the task."""

    probes: Sequence[Probe]
    ids: Sequence[Sequence[int]]
    """One list for each probe."""
    add_bos: bool


def expect_tokens(model: Path, probes: Sequence[Probe], prompting: Prompting) -> Expected:
    """Tokenize texts by transformers.

    Raises:
        BadDataError: the tokenizer is damaged.
    """
    tokenizer = load_tokenizer(model)
    ids = [tokenizer.encode(probe.text, add_special_tokens=False) for probe in probes]
    return Expected(probes, ids, prompting.add_bos)


def check_tokens(expected: Expected, gguf: Path, output: Path, library: Library) -> Facts:
    """Compare token ids and write ``tokens.json`` into ``output``.

    Raises:
        BadDataError: a text is tokenized differently; the message names the first.
    """
    answer = library.tokenize(gguf, [probe.text for probe in expected.probes])
    compare(expected.probes, expected.ids, answer.value["ids"])
    if expected.add_bos:
        check_one_bos(expected.probes, expected.ids, answer.value["bos"])
    facts = {
        "texts": len(expected.probes),
        "tokens": sum(map(len, expected.ids)),
        "vocabulary": answer.value["size"],
        "llama_cpp": answer.llama["version"],
    }
    write_json(output / FILE, facts)
    return facts


def collect_probes(data: Path, prompting: Prompting) -> list[Probe]:
    """Render prompts and completions of about ``ROWS`` rows over all splits.

    Raises:
        BadDataError: the data hold no rows, or are not as prepare writes them.
    """
    rows = [(f"{split} row {number}", row) for split, number, row in read_rows(data)]
    if not rows:
        raise BadDataError(f"{data} has no rows to compare tokens on")
    probes = []
    for place, row in choose(rows, lambda entry: entry[1]["text"]):
        try:
            prompt = prompting.prompt(row["prompt"])
            completion = prompting.completion(row["prompt"], row["completion"])
        except (KeyError, TypeError) as error:
            raise BadDataError(f"{data}: {place} is not as prepare writes it: {error!r}") from error
        probes += [Probe(f"{place}, prompt", prompt), Probe(f"{place}, completion", completion)]
    return probes


def choose(rows: Sequence[Row], text: Callable[[Row], str]) -> list[Row]:
    """Pick the oddest texts and an even spread of the others, in their order."""
    if len(rows) <= ROWS:
        return list(rows)
    order = range(len(rows))
    by_length = sorted(order, key=lambda place: len(text(rows[place])))
    by_rarity = sorted(
        order, key=lambda place: -len({letter for letter in text(rows[place]) if letter > "\x7f"})
    )
    third = ODD // 3
    chosen = {*by_length[:third], *by_length[-third:], *by_rarity[:third]}
    others, wanted = [place for place in order if place not in chosen], ROWS - len(chosen)
    chosen.update(others[number * len(others) // wanted] for number in range(wanted))
    return [rows[place] for place in sorted(chosen)]


def compare(probes: Sequence[Probe], expected: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> None:
    """Raise unless all token ids are equal.

    Raises:
        BadDataError: naming the first text and token that differ, and how many texts do.
    """
    differing = [
        place for place, (ours, theirs) in enumerate(zip(expected, got, strict=True)) if ours != theirs
    ]
    if not differing:
        return
    first = differing[0]
    pairs = enumerate(zip_longest(expected[first], got[first]))
    position, (ours, theirs) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
    raise BadDataError(
        f"{len(differing)} of {len(probes)} texts are tokenized differently after conversion, first "
        f"{probes[first].origin} ({probes[first].text[:60]!r}): token {position} is {ours} in transformers "
        f"and {theirs} in llama.cpp; see that tokenizer_config.json agrees with the tokenizer "
        "(add_prefix_space, added tokens)"
    )


def check_one_bos(probes: Sequence[Probe], ids: Sequence[Sequence[int]], bos: int) -> None:
    """Raise unless every prompt begins with BOS and holds it only there.

    Raises:
        BadDataError: naming the first prompt that does not.
    """
    for probe, tokens in zip(probes, ids, strict=True):
        if probe.origin.endswith("prompt") and (list(tokens[:1]) != [bos] or list(tokens[:2]) == [bos, bos]):
            raise BadDataError(
                f"{probe.origin} does not begin with BOS ({bos}) exactly once: {list(tokens[:3])}"
            )


def read_rows(data: Path) -> Iterable[tuple[str, int, dict[str, Any]]]:
    """Yield split, number and prompt, completion and text of every row of a data artifact.

    Raises:
        BadDataError: a split is damaged, or not as prepare writes it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split in SPLITS:
        path = data / f"{split}.parquet"
        if not path.exists():
            continue
        try:
            table = pq.read_table(path, columns=["prompt", "completion", "text"])
        except (pa.ArrowInvalid, KeyError, OSError) as error:
            raise BadDataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
        for number, row in enumerate(table.to_pylist()):
            yield split, number, row

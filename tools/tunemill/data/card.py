"""Writes the data card: what the data are, how they were cut, and what was left out and why.

The same facts are written twice, for programs (``card.json``) and for people (``README.md``).
Neither holds a time or a path of the machine, so the same data give the same bytes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tunemill.data import stdlib
from tunemill.data.config import STDLIB, PrepareConfig
from tunemill.data.examples import Example, Examples
from tunemill.data.labels import LabelSet
from tunemill.files import write_json, write_text

SPLITS: Final = ("train", "validation", "test")
QUANTILES: Final = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)

REASONS: Final = {
    "blank": "empty text or answer",
    "unrated": "no level given of the text in a dimension",
    "duplicate": "exact repetition of another row with the same answer",
    "leak": "equal or nearly equal to a row of the given test or validation set",
    "too_long": "prompt and completion longer than max_length tokens",
}
"""Why a row was left out, by the short name that ``card.json`` uses."""

LISTED: Final = 100
"""At most so many ids per finding are listed; the count is always exact."""


@dataclass(frozen=True)
class Kept:
    """What is in the data: of every example in order, what was found out about it."""

    examples: Examples
    splits: Sequence[str]
    groups: Sequence[int]
    lengths: Any
    """Tokens of prompt and completion, int ``(examples, 2)``."""


@dataclass(frozen=True)
class Findings:
    """What was found beside the examples."""

    read: int
    """Rows before anything was dropped."""
    shape: str
    dropped: Mapping[str, Sequence[Example]]
    """Reason to the rows left out."""
    contradictions: Sequence[Sequence[str]]
    """Ids of rows with one text and different labels."""
    special: Sequence[tuple[str, str]]
    """Id and special token of rows whose text spells one."""
    digests: Mapping[str, str]
    """What was read, by file name or source, with its sha256 or version."""
    order: Mapping[str, Any] | None = None
    """What the order of the prompt's parts costs; None without a prompt of the task's own."""


def make_card(kept: Kept, findings: Findings, labels: LabelSet, config: PrepareConfig) -> dict[str, Any]:
    """Return the card as JSON-able facts."""
    rows = Counter(kept.splits)
    present = [split for split in SPLITS if rows[split]]
    sizes = Counter(kept.groups)
    found = _found(kept, present)
    dimensions = dict.fromkeys(name for by_dimension in found.values() for name in by_dimension)
    return {
        "dataset": config.dataset_name,
        "revision": config.dataset_revision,
        "license": config.dataset_license or (stdlib.LICENSE if config.dataset_name == STDLIB else None),
        "source": config.dataset_source,
        "read_from": dict(findings.digests),
        "shape": findings.shape,
        "seed": config.seed,
        "max_length": config.max_length,
        "near_duplicate_threshold": config.near_duplicate_threshold,
        "rows_read": findings.read,
        "rows": {split: rows[split] for split in present},
        "dropped": {reason: len(examples) for reason, examples in findings.dropped.items()},
        "dropped_ids": {
            reason: [example.id for example in examples[:LISTED]]
            for reason, examples in findings.dropped.items()
        },
        "near_duplicate_groups": sum(size > 1 for size in sizes.values()),
        "rows_in_near_duplicate_groups": sum(size for size in sizes.values() if size > 1),
        "contradictory_texts": len(findings.contradictions),
        "contradictory_ids": [list(ids) for ids in findings.contradictions[:LISTED]],
        "special_token_texts": len(findings.special),
        "special_token_ids": [list(pair) for pair in findings.special[:LISTED]],
        "labels": _counts(found, dimensions, labels),
        **(
            {"dimensions": {name: _counts(found, [name], labels) for name in dimensions}}
            if config.dimensions is not None
            else {}
        ),
        "tokens": _tokens(kept, present),
        "prompt_order": findings.order,
    }


Found = Mapping[str, Mapping[str, Counter[str | None]]]
"""How often each label is in a dimension of a split; of several labels, each counts."""


def _found(kept: Kept, splits: Sequence[str]) -> Found:
    found: dict[str, dict[str, Counter[str | None]]] = {split: defaultdict(Counter) for split in splits}
    for example, split in zip(kept.examples, kept.splits, strict=True):
        found[split][example.dimension or ""].update(example.labels or (example.label,))
    return found


def _counts(found: Found, dimensions: Iterable[str], labels: LabelSet) -> dict[str, dict[str, int]]:
    """Return how many examples of each split have each label in any of the dimensions."""
    counts = {
        split: sum((by_dimension[name] for name in dimensions), Counter())
        for split, by_dimension in found.items()
    }
    return {label.name: {split: counts[split][label.name] for split in counts} for label in labels.labels}


def write_card(directory: Path, card: Mapping[str, Any]) -> None:
    """Write ``card.json`` and ``README.md``."""
    write_json(directory / "card.json", card)
    write_text(directory / "README.md", _readme(card))


def _tokens(kept: Kept, splits: Sequence[str]) -> dict[str, dict[str, dict[str, int]]]:
    import numpy

    tokens = {}
    for split in splits:
        lengths = kept.lengths[numpy.fromiter((one == split for one in kept.splits), bool)]
        parts = {"prompt": lengths[:, 0], "completion": lengths[:, 1], "total": lengths.sum(axis=1)}
        tokens[split] = {part: _quantiles(numpy.sort(values)) for part, values in parts.items()}
    return tokens


def _quantiles(ordered: Any) -> dict[str, int]:
    """Nearest-rank quantiles: each is a length that occurs."""
    last = len(ordered) - 1
    return {f"{quantile:.0%}": int(ordered[round(quantile * last)]) for quantile in QUANTILES}


def _readme(card: Mapping[str, Any]) -> str:
    splits = list(card["rows"])
    read_from = "; ".join(f"{name} ({digest[:16]})" for name, digest in card["read_from"].items())
    parts = [
        f"# Data card: {card['dataset']}",
        _table(
            ["", ""],
            [
                ["source", card["source"] or card["dataset"]],
                ["revision", card["revision"] or "-"],
                ["licence", card["license"] or "not stated"],
                ["read from", read_from],
                ["shape of the rows", card["shape"]],
                ["seed", card["seed"]],
            ],
        ),
        "## Rows",
        _table(["split", "rows"], [[split, card["rows"][split]] for split in splits]),
        *([f"{card['unlabelled']} more are only to be predicted."] if card["unlabelled"] else []),
        f"{card['rows_read']} rows were read. Left out:",
        _table(
            ["why", "rows"],
            [[REASONS[reason], number] for reason, number in card["dropped"].items()],
        ),
        f"{card['rows_in_near_duplicate_groups']} rows are in {card['near_duplicate_groups']} groups of "
        "equal or nearly equal texts (Jaccard similarity of word pairs of at least "
        f"{card['near_duplicate_threshold']}); no group is in two splits.",
        f"{card['contradictory_texts']} texts occur with more than one label. "
        f"{card['special_token_texts']} rows spell one of the model's special tokens in their text.",
    ]
    if card["prompt_order"] and card["prompt_order"]["tokens_again"]:
        parts.append(
            f"About {card['prompt_order']['tokens_again']} tokens of each prompt "
            f"({card['prompt_order']['share']:.0%}) are computed again only because of where they stand."
        )
    if card["labels"]:
        parts += ["## Labels", _balance(card, splits)]
    if card.get("dimensions"):
        parts += ["## Dimensions", _levels(card)]
    return "\n\n".join([*parts, "## Tokens", *_token_tables(card, splits)]) + "\n"


def _balance(card: Mapping[str, Any], splits: Sequence[str]) -> str:
    totals = {split: max(card["rows"][split], 1) for split in splits}
    rows = [
        [name, *(f"{counts[split]} ({counts[split] / totals[split]:.1%})" for split in splits)]
        for name, counts in card["labels"].items()
    ]
    return _table(["label", *splits], rows)


def _levels(card: Mapping[str, Any]) -> str:
    """Rows of each dimension by level, over all splits."""
    rows = [
        [name, *(sum(counts.values()) for counts in levels.values())]
        for name, levels in card["dimensions"].items()
    ]
    return _table(["dimension", *card["labels"]], rows)


def _token_tables(card: Mapping[str, Any], splits: Sequence[str]) -> list[str]:
    intro = (
        f"Under the base model's tokenizer and chat template; at most {card['max_length']} "
        "for prompt and completion together."
    )
    names = [f"{quantile:.0%}" for quantile in QUANTILES]
    rows = [
        [f"{split}, {part}", *(quantiles[name] for name in names)]
        for split in splits
        for part, quantiles in card["tokens"][split].items()
    ]
    return [intro, _table(["tokens at quantile", *names], rows)]


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")

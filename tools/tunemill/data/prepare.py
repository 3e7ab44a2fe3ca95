"""The prepare stage: rows in, split and deduplicated prompts with a data card out.

Each step is a module of its own: find the rows (``formats``), read them as examples
(``examples``), find repetitions (``deduplicate``), cut (``split``), count tokens (``lengths``),
describe (``card``). Nothing here depends on time, place or thread count: the same data, base
and seed give byte-identical files.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tunemill.data.card import Findings, Kept, make_card, write_card
from tunemill.data.config import PrepareConfig
from tunemill.data.content_free import FILE as CONTENT_FREE
from tunemill.data.content_free import content_free_prompts
from tunemill.data.deduplicate import find_duplicates
from tunemill.data.examples import Example, Shape, described, label_values, read_examples, recognise
from tunemill.data.formats import check_source, read_rows, read_unlabelled, source_digests
from tunemill.data.labels import NO_LABELS, LabelSet, label_set
from tunemill.data.lengths import Length, count_tokens, special_texts
from tunemill.data.split import split_examples
from tunemill.data.tables import UNLABELLED, Row
from tunemill.data.template import LABELS, computed_again, fill
from tunemill.errors import BadDataError
from tunemill.files import atomic_write, write_json
from tunemill.prompting import read_prompting
from tunemill.tokenizer import load_tokenizer
from tunemill.work import Facts, Work

log = logging.getLogger("tunemill")

WORTH_SAYING: Final = 0.05
"""Share of a prompt's tokens from which a better order is worth a warning."""
PUNCTUATION: Final = 8
"""Tokens that stand between a prompt's places wherever they are."""
SAMPLE: Final = 256
"""Texts whose mean length stands for all."""

SPLITS = ("train", "validation", "test")
PRECEDENCE = {None: 0, "train": 0, "validation": 1, "test": 2}
"""Of two near-equal rows in given splits, the one in the higher split stays."""


def check(config: PrepareConfig) -> None:
    """Refuse a dataset that cannot be found, before the base is pulled.

    Raises:
        UsageError: no file is there, or a Hub dataset has no revision.
    """
    check_source(config)


def reads(config: PrepareConfig) -> Mapping[str, str]:
    """Return digests of the local files, or Python's version for the demo's docstrings."""
    return source_digests(config)


def prepare(work: Work[PrepareConfig]) -> Facts:
    """Write the splits, labels, task, prompting and data card into ``work.output``.

    Raises:
        BadDataError: the data are empty, malformed, or lack what the task needs.
        TransientError: the disk is full.
    """
    config, base = work.config, work.inputs["base"].path
    rows = read_rows(config, work.scratch, work.progress)
    shape = recognise(rows, config)
    labels = _labels(rows, shape, config)
    filled = _with_labels(config, labels)
    read = read_examples(rows, shape, labels, filled)
    examples = [example for example in read if not (example.unrated or _is_blank(example))]
    dropped = {"blank": _ids(example for example in read if _is_blank(example) and not example.unrated)}
    if config.dimensions is not None:
        dropped["unrated"] = _ids(example for example in read if example.unrated)
    work.progress.say(f"prepare: {len(rows)} rows read as {shape.name}")

    prompting, tokenizer = read_prompting(base), load_tokenizer(base)
    duplicates = find_duplicates(examples, config.near_duplicate_threshold, work.progress)
    lengths = count_tokens(examples, prompting, tokenizer, work.progress)
    reasons = _reasons(examples, duplicates.dropped, duplicates.groups, lengths, config.max_length)
    for name in ("duplicate", "leak", "too_long"):
        dropped[name] = _ids(examples[n] for n, reason in reasons.items() if reason == name)

    kept = _cut(examples, reasons, duplicates.groups, lengths, config)
    _check_kept(kept, dropped, config)
    special = special_texts([one.example for one in kept], tokenizer)
    digests = {Path(name).name: digest for name, digest in source_digests(config).items()}
    order = _order(kept, labels, config, tokenizer)
    findings = Findings(len(read), shape.name, dropped, duplicates.contradictions, special, digests, order)
    card = make_card(kept, findings, labels, config)
    _write(work.output, kept, labels, config)
    unlabelled = _unlabelled(shape, labels, filled)
    if unlabelled:
        _write_parquet(work.output / f"{UNLABELLED}.parquet", unlabelled)
    card["unlabelled"] = len(unlabelled)
    if shape.name in ("text-label", "dimensions"):
        write_json(work.output / CONTENT_FREE, content_free_prompts(rows, shape, labels, filled))
    write_card(work.output, card)
    prompting.save(work.output)
    return _facts(card, labels, config)


def _labels(rows: Sequence[Row], shape: Shape, config: PrepareConfig) -> LabelSet:
    if not shape.labelled:
        return NO_LABELS
    return label_set(config, [] if config.labels else label_values(rows, shape, config))


def _with_labels(config: PrepareConfig, labels: LabelSet) -> PrepareConfig:
    if config.system_prompt is None:
        return config
    system = fill(config.system_prompt, {LABELS: labels.listed()}, "system_prompt")
    return config.model_copy(update={"system_prompt": system})


def _order(
    kept: Sequence[Kept], labels: LabelSet, config: PrepareConfig, tokenizer: Any
) -> Mapping[str, Any] | None:
    """Return what the order of the prompt's parts costs, and say so where it is worth it."""
    if config.prompt is None:
        return None
    mean = sum(one.length.prompt for one in kept) / len(kept)
    texts = [one.example.text for one in kept[:SAMPLE]]
    again = computed_again(config.prompt, labels.listed(), described(config), texts, tokenizer)
    share = again / mean
    if share >= WORTH_SAYING and again > PUNCTUATION:
        log.warning(
            "prepare: about %.0f of each prompt's %.0f tokens (%.0f%%) are computed again for every row at "
            "inference, because of where they stand: put what all prompts say first, then the text%s",
            again,
            mean,
            100 * share,
            ", then {dimension}" if config.dimensions else "",
        )
    return {"tokens_again": round(again), "share": round(share, 4)}


def _is_blank(example: Example) -> bool:
    return not example.text.strip() or not example.completion


def _ids(examples: Any) -> list[str]:
    return [example.id for example in examples]


def _reasons(
    examples: Sequence[Example],
    repeated: frozenset[int],
    groups: Sequence[int],
    lengths: Sequence[Length],
    max_length: int,
) -> dict[int, str]:
    """Return, for the positions to drop, the first reason that holds."""
    highest: dict[int, int] = defaultdict(int)
    for example, group in zip(examples, groups, strict=True):
        highest[group] = max(highest[group], PRECEDENCE[example.split])
    reasons: dict[int, str] = {}
    for position, example in enumerate(examples):
        if PRECEDENCE[example.split] < highest[groups[position]]:
            reasons[position] = "leak"
        elif position in repeated:
            reasons[position] = "duplicate"
        elif lengths[position].total > max_length:
            reasons[position] = "too_long"
    return reasons


def _cut(
    examples: Sequence[Example],
    reasons: Mapping[int, str],
    groups: Sequence[int],
    lengths: Sequence[Length],
    config: PrepareConfig,
) -> list[Kept]:
    positions = [n for n in range(len(examples)) if n not in reasons]
    kept = [examples[n] for n in positions]
    splits = split_examples(
        kept, [groups[n] for n in positions], config.test_size, config.validation_size, config.seed
    )
    return [
        Kept(example, split, groups[n], lengths[n])
        for example, split, n in zip(kept, splits, positions, strict=True)
    ]


def _check_kept(kept: Sequence[Kept], dropped: Mapping[str, Sequence[str]], config: PrepareConfig) -> None:
    _check_ids(kept)
    if not any(one.split == "train" for one in kept):
        why = (
            ", ".join(f"{len(ids)} {reason}" for reason, ids in dropped.items() if ids) or "all are held out"
        )
        raise BadDataError(f"{config.dataset_name} leaves no row to train on: {why}")


def _check_ids(kept: Sequence[Kept]) -> None:
    seen: dict[tuple[str, str], str] = {}
    for one in kept:
        key = (one.example.split or "", one.example.id)
        if key in seen:
            raise BadDataError(
                f"{seen[key]} and {one.example.where} have the same id {one.example.id!r}: "
                "set id_column to a column that tells rows apart"
            )
        seen[key] = one.example.where


def _unlabelled(shape: Shape, labels: LabelSet, config: PrepareConfig) -> list[Kept]:
    """Return the texts that are only to be predicted: all of them, for infer says why it cannot take one."""
    rows = read_unlabelled(config)
    if rows and not (shape.labelled or shape.name == "columns"):
        raise BadDataError(
            f"unlabelled_files are for tables of texts, and {config.dataset_name} is read as {shape.name}: "
            "set text_column and label_column (or completion_column)"
        )
    examples = read_examples(rows, shape, labels, config)
    groups = {name: number for number, name in enumerate(dict.fromkeys(map(_text_id, examples)))}
    kept = [Kept(example, UNLABELLED, groups[_text_id(example)], Length(0, 0)) for example in examples]
    _check_ids(kept)
    return kept


def _text_id(example: Example) -> str:
    return example.item or example.id


def _write(directory: Path, kept: Sequence[Kept], labels: LabelSet, config: PrepareConfig) -> None:
    for split in SPLITS:
        rows = [one for one in kept if one.split == split]
        if rows:
            _write_parquet(directory / f"{split}.parquet", rows)
    write_json(directory / "labels.json", labels.as_json())
    write_json(
        directory / "task.json",
        {
            "task": config.task or Path(config.dataset_name).stem,
            "form": _form(labels, config),
            "max_labels": config.max_labels,
            "separator": config.label_separator,
            "ordered": config.ordered,
            "dimensions": list(config.dimensions or ()),
            "answer_kind": config.answer_kind,
            "system_prompt": config.system_prompt,
            "prompt": config.prompt,
            "max_length": config.max_length,
        },
    )


def _form(labels: LabelSet, config: PrepareConfig) -> str:
    if not labels.labels:
        return "text"
    return "labels" if config.max_labels else "label"


def _write_parquet(path: Path, kept: Sequence[Kept]) -> None:
    import pyarrow
    import pyarrow.parquet

    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    types = {
        "id": pyarrow.string(),
        "prompt": pyarrow.list_(message),
        "completion": pyarrow.string(),
        "text": pyarrow.string(),
        "label": pyarrow.string(),
        "group": pyarrow.int64(),
        **({"item": pyarrow.string(), "dimension": pyarrow.string()} if kept[0].example.dimension else {}),
        **({"labels": pyarrow.list_(pyarrow.string())} if kept[0].example.labels else {}),
    }
    schema = pyarrow.schema(list(types.items()))
    columns = {name: [getattr(one.example, name) for one in kept] for name in types if name != "group"}
    columns["group"] = [one.group for one in kept]
    with atomic_write(path) as target:
        pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), target, compression="zstd")


def _facts(card: Mapping[str, Any], labels: LabelSet, config: PrepareConfig) -> Facts:
    return {
        "rows": card["rows"],
        "rows_read": card["rows_read"],
        "unlabelled": card["unlabelled"],
        "dropped": card["dropped"],
        "form": _form(labels, config),
        "labels": len(labels.labels),
        "near_duplicate_groups": card["near_duplicate_groups"],
    }

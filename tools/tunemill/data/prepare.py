"""The prepare stage: rows in, split and deduplicated prompts with a data card out.

Each step is a module of its own: find the rows (``formats``), read them as examples
(``examples``), find repetitions (``deduplicate``), cut (``split``), count tokens (``lengths``),
describe (``card``). Nothing here depends on time, place or thread count: the same data, base
and seed give byte-identical files.
"""

from __future__ import annotations

import logging
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

from tunemill.data.card import SPLITS, Findings, Kept, make_card, write_card
from tunemill.data.config import PrepareConfig
from tunemill.data.content_free import FILE as CONTENT_FREE
from tunemill.data.content_free import content_free_prompts
from tunemill.data.deduplicate import find_duplicates
from tunemill.data.examples import Example, Examples, Shape, described, label_values, read_examples, recognise
from tunemill.data.formats import check_source, read_rows, read_unlabelled, source_digests
from tunemill.data.labels import NO_LABELS, LabelSet, label_set
from tunemill.data.lengths import count_tokens, special_texts
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

ROW_GROUP: Final = 64 << 20
"""Bytes of rows, not yet compressed, from which a row group of Parquet is written."""
BATCH: Final = 1024
"""Rows that are in memory as Python's objects at once."""

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
    empty = [_empty(example) for example in read]
    examples = read.select(_where(empty, None))
    dropped = {"blank": read.select(_where(empty, "blank"))}
    if config.dimensions is not None:
        dropped["unrated"] = read.select(_where(empty, "unrated"))
    work.progress.say(f"prepare: {len(rows)} rows read as {shape.name}")

    prompting, tokenizer = read_prompting(base), load_tokenizer(base)
    duplicates = find_duplicates(examples, config.near_duplicate_threshold, work.progress)
    lengths = count_tokens(examples, prompting, tokenizer, work.progress)
    reasons = _reasons(examples, duplicates.dropped, duplicates.groups, lengths, config.max_length)
    for name in ("duplicate", "leak", "too_long"):
        dropped[name] = examples.select(_where(reasons, name))

    kept = _cut(examples, reasons, duplicates.groups, lengths, config)
    _check_kept(kept, dropped, config)
    special = special_texts(kept.examples, tokenizer)
    digests = {Path(name).name: digest for name, digest in source_digests(config).items()}
    order = _order(kept, labels, config, tokenizer)
    findings = Findings(len(read), shape.name, dropped, duplicates.contradictions, special, digests, order)
    card = make_card(kept, findings, labels, config)
    _write(work.output, kept, labels, config)
    card["unlabelled"] = _write_unlabelled(work.output, shape, labels, filled)
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


def _order(kept: Kept, labels: LabelSet, config: PrepareConfig, tokenizer: Any) -> Mapping[str, Any] | None:
    """Return what the order of the prompt's parts costs, and say so where it is worth it."""
    if config.prompt is None:
        return None
    mean = float(kept.lengths[:, 0].mean())
    texts = [example.text for example in kept.examples[:SAMPLE]]
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


def _empty(example: Example) -> str | None:
    if example.unrated:
        return "unrated"
    return None if example.text.strip() and example.completion else "blank"


def _where(values: Sequence[str | None], wanted: str | None) -> Iterator[int]:
    return (position for position, value in enumerate(values) if value == wanted)


def _reasons(
    examples: Sequence[Example],
    repeated: frozenset[int],
    groups: Sequence[int],
    lengths: Any,
    max_length: int,
) -> list[str | None]:
    """Return for every example the first reason to drop it that holds."""
    ranks = [PRECEDENCE[example.split] for example in examples]
    highest: dict[int, int] = defaultdict(int)
    for rank, group in zip(ranks, groups, strict=True):
        highest[group] = max(highest[group], rank)
    reasons: list[str | None] = []
    for position, (rank, group, tokens) in enumerate(zip(ranks, groups, lengths.sum(axis=1), strict=True)):
        if rank < highest[group]:
            reasons.append("leak")
        elif position in repeated:
            reasons.append("duplicate")
        else:
            reasons.append("too_long" if tokens > max_length else None)
    return reasons


def _cut(
    examples: Examples,
    reasons: Sequence[str | None],
    groups: Sequence[int],
    lengths: Any,
    config: PrepareConfig,
) -> Kept:
    stays = array("i", _where(reasons, None))
    kept, grouped = examples.select(stays), array("i", (groups[n] for n in stays))
    splits = split_examples(kept, grouped, config.test_size, config.validation_size, config.seed)
    return Kept(kept, splits, grouped, lengths[stays])


def _check_kept(kept: Kept, dropped: Mapping[str, Sequence[Example]], config: PrepareConfig) -> None:
    _check_ids(kept.examples)
    if "train" not in kept.splits:
        why = ", ".join(f"{len(found)} {reason}" for reason, found in dropped.items() if found)
        raise BadDataError(f"{config.dataset_name} leaves no row to train on: {why or 'all are held out'}")


def _check_ids(examples: Sequence[Example]) -> None:
    """Find two rows of one id; hashes, 8 bytes each, tell which ids have to be looked at."""
    import numpy

    hashes = array("q", (hash(_key(example)) for example in examples))
    values, times = numpy.unique(hashes, return_counts=True)
    twice = set(values[times > 1].tolist())
    if not twice:
        return
    seen: dict[tuple[str, str], str] = {}
    for example, value in zip(examples, hashes, strict=True):
        if value not in twice:
            continue
        if (key := _key(example)) in seen:
            raise BadDataError(
                f"{seen[key]} and {example.where} have the same id {example.id!r}: "
                "set id_column to a column that tells rows apart"
            )
        seen[key] = example.where


def _key(example: Example) -> tuple[str, str]:
    return example.split or "", example.id


def _write_unlabelled(directory: Path, shape: Shape, labels: LabelSet, config: PrepareConfig) -> int:
    """Write the texts that are only to be predicted: all of them, for infer says why it cannot take one."""
    rows = read_unlabelled(config)
    if rows and not (shape.labelled or shape.name == "columns"):
        raise BadDataError(
            f"unlabelled_files are for tables of texts, and {config.dataset_name} is read as {shape.name}: "
            "set text_column and label_column (or completion_column)"
        )
    examples = read_examples(rows, shape, labels, config)
    if examples:
        _check_ids(examples)
        groups: dict[str, int] = {}
        of = array("i", (groups.setdefault(one.item or one.id, len(groups)) for one in examples))
        _write_parquet(directory / f"{UNLABELLED}.parquet", examples, of)
    return len(examples)


def _write(directory: Path, kept: Kept, labels: LabelSet, config: PrepareConfig) -> None:
    for split in SPLITS:
        positions = array("i", _where(kept.splits, split))
        if positions:
            groups = array("i", (kept.groups[n] for n in positions))
            _write_parquet(directory / f"{split}.parquet", kept.examples.select(positions), groups)
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


def _write_parquet(path: Path, examples: Sequence[Example], groups: Sequence[int]) -> None:
    import pyarrow
    import pyarrow.parquet

    first = examples[0]
    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    types = {
        "id": pyarrow.string(),
        "prompt": pyarrow.list_(message),
        "completion": pyarrow.string(),
        "text": pyarrow.string(),
        "label": pyarrow.string(),
        "group": pyarrow.int64(),
        **({"item": pyarrow.string(), "dimension": pyarrow.string()} if first.dimension else {}),
        **({"labels": pyarrow.list_(pyarrow.string())} if first.labels else {}),
    }
    schema = pyarrow.schema(list(types.items()))
    with (
        atomic_write(path) as target,
        pyarrow.parquet.ParquetWriter(target, schema, compression="zstd") as writer,
    ):
        for table in _tables(examples, groups, schema):
            writer.write_table(table)


def _tables(examples: Sequence[Example], groups: Sequence[int], schema: Any) -> Iterator[Any]:
    """Yield the rows as tables of at least ``ROW_GROUP`` bytes, but for the last."""
    import pyarrow

    rows = iter(zip(examples, groups, strict=True))
    batches: list[Any] = []
    size = 0
    while some := list(islice(rows, BATCH)):
        columns = {
            name: [group if name == "group" else getattr(example, name) for example, group in some]
            for name in schema.names
        }
        batches.append(pyarrow.record_batch(columns, schema=schema))
        size += batches[-1].nbytes
        if size >= ROW_GROUP:
            yield pyarrow.Table.from_batches(batches).combine_chunks()
            batches, size = [], 0
    if batches:
        yield pyarrow.Table.from_batches(batches).combine_chunks()


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

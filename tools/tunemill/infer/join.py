"""Shards of one inference joined: the same files as one machine would have made.

Shard *i* of *n* has the blocks *i*, *i + n*, *i + 2n* …: so shards are equally long, and a dataset that
has its long texts at one end gives every shard its part of them. A block's predictions depend on its own
rows alone, so taking the blocks in turn gives the undivided run's file, byte by byte.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tunemill.errors import BadDataError
from tunemill.files import atomic_write, write_json
from tunemill.infer.config import InferConfig, shard_role
from tunemill.infer.result import CONTENT_FREE, DESCRIPTION, PREDICTIONS, RECORD, refuse_none_predicted, tally
from tunemill.infer.rows import SCHEMA
from tunemill.work import Facts, Input, Work

OWN = ("shard", "rows", "errors", "cut_off", "error_reasons", "most_pruned", CONTENT_FREE)
"""What of the record is each shard's own; two machines may compute the last one's last bits differently."""
NEEDED = ("form", "split", "labels", "llama_cpp", "config")


@dataclass(frozen=True)
class Shard:
    """One shard's predictions, as its ``infer`` left them."""

    role: str
    path: Path
    record: Mapping[str, Any]
    blocks: Any
    """Its ``ParquetFile``: a row group for each block."""

    @property
    def common(self) -> dict[str, Any]:
        """What has to be the same in all shards: inputs, settings, llama.cpp."""
        return {key: value for key, value in self.record.items() if key not in OWN}


def join(work: Work[InferConfig]) -> Facts:
    """Join the predictions of all shards.

    Raises:
        BadDataError: one is damaged or was made of something else than the others, or nothing
            could be predicted in any.
    """
    count = work.config.shard_count
    shards = [_read(work.inputs[shard_role(index)], index, count) for index in range(count)]
    _check_alike(shards)
    _check_complete(shards)
    with (
        work.progress.task("join", sum(shard.blocks.num_row_groups for shard in shards), "blocks") as task,
        atomic_write(work.output / PREDICTIONS) as sink,
        pyarrow.parquet.ParquetWriter(sink, SCHEMA) as writer,
    ):
        for block in _in_turn(shards):
            writer.write_table(block)
            task.advance(1)
    for name in DESCRIPTION:
        shutil.copyfile(shards[0].path / name, work.output / name)
    counts = tally(_in_turn(shards))
    refuse_none_predicted(_in_turn(shards), counts)
    common = shards[0].common
    calibration = {key: shards[0].record[key] for key in (CONTENT_FREE,) if key in shards[0].record}
    write_json(work.output / RECORD, {**common, **counts, **calibration})
    return {**{key: common[key] for key in ("form", "split", "labels", "llama_cpp")}, **counts}


def _read(shard: Input, index: int, count: int) -> Shard:
    """Open a shard.

    Raises:
        BadDataError: it is damaged, or another one.
    """
    role = shard_role(index)
    try:
        record = json.loads((shard.path / RECORD).read_text("utf-8"))
        blocks = pyarrow.parquet.ParquetFile(shard.path / PREDICTIONS)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise BadDataError(
            f"{role} ({shard.reference}) cannot be read: {reason}; run infer for it again"
        ) from error
    if not isinstance(record, dict) or record.get("shard") != {"index": index, "count": count}:
        raise BadDataError(
            f"{role} ({shard.reference}) is not shard {index} of {count}: run infer for it again"
        )
    if missing := [key for key in NEEDED if key not in record]:
        raise BadDataError(f"{role} ({shard.reference}): {RECORD} lacks {missing[0]}; run infer for it again")
    if not blocks.schema_arrow.equals(SCHEMA):
        raise BadDataError(f"{role} ({shard.reference}) has other columns than infer writes: run it again")
    return Shard(role, shard.path, record, blocks)


def _check_alike(shards: Sequence[Shard]) -> None:
    first = shards[0]
    for shard in shards[1:]:
        if shard.common != first.common:
            raise BadDataError(
                f"{shard.role} and {first.role} differ in {_difference(first.common, shard.common)}: "
                "run infer again for all shards with the same settings, model and data"
            )
        for name in DESCRIPTION:
            if (shard.path / name).read_bytes() != (first.path / name).read_bytes():
                raise BadDataError(
                    f"{shard.role} and {first.role} differ in {name}: run infer again for both"
                )


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return the key that differs, and the values if they are settings."""
    for key in sorted({*one, *other}):
        if one.get(key) == other.get(key):
            continue
        if key == "config" and isinstance(one.get(key), dict) and isinstance(other.get(key), dict):
            return _difference(one[key], other[key])
        return f"{key} ({other.get(key)} and {one.get(key)})"
    raise AssertionError("the two are alike")


def _check_complete(shards: Sequence[Shard]) -> None:
    """Refuse shards of which one lacks blocks, or has some that are too short."""
    sizes = [
        [shard.blocks.metadata.row_group(block).num_rows for block in range(shard.blocks.num_row_groups)]
        for shard in shards
    ]
    total, most = sum(map(len, sizes)), shards[0].common["config"].get("block_rows")
    for index, (shard, found) in enumerate(zip(shards, sizes, strict=True)):
        wanted = len(range(index, total, len(shards)))
        last_of_all = total and (total - 1) % len(shards) == index
        full = found[:-1] if last_of_all else found
        if len(found) != wanted or any(rows != most for rows in full):
            raise BadDataError(
                f"{shard.role} has {sum(found)} rows in {len(found)} blocks, which is not its part of "
                f"{total} blocks: run infer for it again"
            )


def _in_turn(shards: Sequence[Shard]) -> Iterator[Any]:
    """Yield the blocks of all shards in the order of the data."""
    for number in range(sum(shard.blocks.num_row_groups for shard in shards)):
        shard = shards[number % len(shards)]
        try:
            yield shard.blocks.read_row_group(number // len(shards))
        except (OSError, pyarrow.ArrowException) as error:
            reason = str(error).partition("\n")[0]
            raise BadDataError(f"{shard.role} is damaged: {reason}; run infer for it again") from error

"""Finds the rows of a dataset wherever it is: here, on the Hub, saved by ``datasets``, or made.

A dataset may come with its own splits: Hub splits, ``test_files``, or files of a directory
named train, validation and test. What is given as test stays test.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from tunemill.data import stdlib
from tunemill.data.config import STDLIB, PrepareConfig
from tunemill.data.tables import READERS, UNLABELLED, Row, read_table
from tunemill.errors import BadDataError, UsageError
from tunemill.files import sha256_file
from tunemill.progress import Progress

SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Names that files and Hub splits go by, to the split they are."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_local(config: PrepareConfig) -> bool:
    """Tell a path or glob from the id of a Hub dataset."""
    name = config.dataset_name
    return (
        has_magic(name)
        or name.startswith((".", "/", "~"))
        or Path(name).suffix.lower() in READERS
        or not _HUB_ID.fullmatch(name)
        or Path(name).is_dir()
    )


def check_source(config: PrepareConfig) -> None:
    """Find what is wrong with the dataset's name before anything is pulled.

    Raises:
        UsageError: nothing is there, or a Hub dataset is named without its revision.
    """
    if config.dataset_name == STDLIB:
        return
    if is_local(config):
        data_files(config)
    elif not config.dataset_revision:
        raise UsageError(
            f"dataset_revision is missing for {config.dataset_name}: pin the commit of the Hub dataset "
            "(or, for a local file, check the path)"
        )


def source_digests(config: PrepareConfig) -> dict[str, str]:
    """Return what the rows depend on beside the configuration: digests, a commit, Python's version.

    Raises:
        UsageError, DeniedError, TransientError: a branch or tag cannot be resolved on the Hub.
    """
    if config.dataset_name == STDLIB:
        return {STDLIB: stdlib.version()}
    if is_local(config):
        return {str(path): sha256_file(path) for path in data_files(config)}
    from tunemill.data import hub

    commit = hub.resolve(config.dataset_name, str(config.dataset_revision), "dataset")
    return {"commit": commit, **{str(path): sha256_file(path) for path in _further_files(config)}}


def data_files(config: PrepareConfig) -> list[Path]:
    """Return every local file that rows are read from: train, test, unlabelled, each sorted.

    Raises:
        UsageError: a name stands for no file.
    """
    return [*_training_files(config), *_further_files(config)]


def read_rows(config: PrepareConfig, scratch: Path, progress: Progress) -> list[Row]:
    """Return all rows of the configured dataset; ``scratch`` is for what has to be downloaded.

    Raises:
        BadDataError: it has no rows, or a file is malformed.
    """
    if config.dataset_name == STDLIB:
        rows = _stdlib()
    elif is_local(config):
        rows = _local(config)
    else:
        from tunemill.data import hub

        rows = hub.dataset_rows(config, scratch, progress)
    if config.test_files:
        rows = [replace(row, split=row.split or "train") for row in rows if row.split != "test"]
        rows += [
            replace(row, split="test") for path in _expand(config.test_files) for row in read_table(path)
        ]
    if not rows:
        raise BadDataError(f"{config.dataset_name} is empty: it has no row to learn from")
    return rows


def read_unlabelled(config: PrepareConfig) -> list[Row]:
    """Return the rows of ``unlabelled_files``.

    Raises:
        BadDataError: a file is malformed.
    """
    return [
        replace(row, split=UNLABELLED)
        for path in _expand(config.unlabelled_files)
        for row in read_table(path)
    ]


def _further_files(config: PrepareConfig) -> list[Path]:
    return [*_expand(config.test_files), *_expand(config.unlabelled_files)]


def _stdlib() -> list[Row]:
    return [
        Row(
            f"{STDLIB} {item.id}", item.id,
            {"id": item.id, "text": item.text, "label": item.label, "module": item.module},
        )
        for item in stdlib.docstrings()
    ]  # fmt: skip


def _local(config: PrepareConfig) -> list[Row]:
    directory = Path(config.dataset_name).expanduser()
    if _is_saved(directory):
        from tunemill.data import hub

        return hub.saved_rows(directory, config)
    named = directory.is_dir()
    rows: list[Row] = []
    for path in _training_files(config):
        split = SPLITS.get(path.stem.lower()) if named else None
        rows += [replace(row, split=split) for row in read_table(path)]
    return rows


def _is_saved(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _training_files(config: PrepareConfig) -> list[Path]:
    directory = Path(config.dataset_name).expanduser()
    if _is_saved(directory):
        return sorted(path for path in directory.rglob("*") if path.is_file())
    if not directory.is_dir():
        return _expand([config.dataset_name])
    files = sorted(path for path in directory.iterdir() if path.suffix.lower() in READERS)
    split = [path for path in files if path.stem.lower() in SPLITS]
    if any(SPLITS[path.stem.lower()] == "train" for path in split):
        files = split  # what lies beside train.csv (labels, predictions) is not data to learn from
    if not files:
        raise UsageError(f"{directory} holds no data file ({', '.join(READERS)})")
    return files


def _expand(patterns: Iterable[str]) -> list[Path]:
    files: list[Path] = []
    for pattern in patterns:
        name = str(Path(pattern).expanduser())
        found = [Path(name)] if Path(name).is_file() else [Path(path) for path in sorted(glob(name))]  # noqa: PTH207 - also absolute
        if not found:
            raise UsageError(f"no file is at {pattern}: check the path, it is relative to {Path.cwd()}")
        files += found
    return files


def first_values(rows: Iterable[Row]) -> dict[str, Any]:
    """Return, for every column that any row has, the first value that is not null."""
    found: dict[str, Any] = {}
    for row in rows:
        for column, value in row.values.items():
            if found.get(column) is None:
                found[column] = value
    return found

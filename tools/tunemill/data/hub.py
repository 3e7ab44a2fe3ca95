"""The Hugging Face Hub: model files and datasets at a pinned commit, and what goes wrong there.

The token comes from ``HF_TOKEN``, or the file that ``HF_TOKEN_PATH`` or the Hub's own login
names; it is handed to the Hub's library and is never printed or recorded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunemill.data.config import PrepareConfig
from tunemill.data.tables import Row
from tunemill.errors import BadDataError, DeniedError, IntegrityError, TransientError, UsageError
from tunemill.files import disk_errors, need_space, sha256_file
from tunemill.progress import Progress

Kind = Literal["model", "dataset"]
COMMIT = re.compile(r"[0-9a-f]{40}")
WORKERS = 4
"""Files fetched at once; the Hub's client opens further connections for each large one."""


@dataclass(frozen=True)
class HubFile:
    """One file of a repository."""

    path: str
    size: int
    """Bytes."""
    digest: str | None
    """Hex sha256 where the Hub knows it, that is, for large files."""


def resolve(name: str, revision: str, kind: Kind) -> str:
    """Return the commit that a revision stands for; 40 hex digits are one already.

    Raises:
        UsageError: the repository or the revision does not exist.
        DeniedError: it is gated or private and the token, if any, does not open it.
        TransientError: the Hub cannot be reached.
    """
    if COMMIT.fullmatch(revision):
        return revision
    with hub_errors(name, revision):
        return str(_api().repo_info(name, revision=revision, repo_type=kind).sha)


def list_files(name: str, commit: str, kind: Kind) -> list[HubFile]:
    """Return the files of a repository: of a model those in its top directory, else all.

    Raises:
        UsageError, DeniedError, TransientError: as ``resolve``.
    """
    from huggingface_hub.hf_api import RepoFile

    with hub_errors(name, commit):
        tree = _api().list_repo_tree(name, revision=commit, repo_type=kind, recursive=kind == "dataset")
        return [
            HubFile(entry.path, int(entry.size), entry.lfs.sha256 if entry.lfs else None)
            for entry in tree
            if isinstance(entry, RepoFile)
        ]


def download(
    name: str, commit: str, kind: Kind, files: Sequence[HubFile], destination: Path, progress: Progress
) -> None:
    """Download files of a repository; what a killed attempt has left is taken up again.

    Raises:
        IntegrityError: a file is not what the Hub's listing promised.
        UsageError, DeniedError, TransientError: as ``resolve``, or the disk is full.
    """
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # ours is shown instead

    def get(file: HubFile) -> None:
        with hub_errors(name, commit), disk_errors(destination):
            _api().hf_hub_download(name, file.path, revision=commit, repo_type=kind, local_dir=destination)
        _verify(destination / file.path, file)
        task.advance(file.size)

    total = sum(file.size for file in files)
    need_space(destination, total)
    with progress.task(f"download {name}", total, "B") as task, ThreadPoolExecutor(WORKERS) as pool:
        for done in [pool.submit(get, file) for file in files]:
            done.result()


def _verify(path: Path, file: HubFile) -> None:
    size = path.stat().st_size
    if size != file.size or (file.digest and sha256_file(path) != file.digest):
        path.unlink()
        raise IntegrityError(
            f"{file.path} arrived damaged ({size} of {file.size} bytes): it was removed, fetch again"
        )


def _api() -> Any:
    """The Hub's client, at the endpoint that the environment names now."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def dataset_rows(config: PrepareConfig, scratch: Path, progress: Progress) -> list[Row]:
    """Return the rows of a Hub dataset's configured splits.

    Its files are downloaded at the commit and read from there: ``datasets`` itself would, when
    the Hub fails, quietly take whatever revision its cache holds.

    Raises:
        BadDataError: it has no such split or configuration, or needs code to load.
        UsageError, DeniedError, TransientError: as ``resolve``, or the disk is full.
    """
    name = config.dataset_name
    commit = resolve(name, str(config.dataset_revision), "dataset")
    files = [file for file in list_files(name, commit, "dataset") if file.path != ".gitattributes"]
    code = [file.path for file in files if file.path == f"{name.split('/')[-1]}.py"]
    if code:
        raise BadDataError(
            f"{name} needs its own code ({code[0]}), which is never run: take its parquet files"
        )
    directory = scratch / f"dataset-{commit}"
    download(name, commit, "dataset", files, directory, progress)
    return _dataset_rows(_load(directory, config, scratch / "datasets-cache"), config)


def _load(directory: Path, config: PrepareConfig, cache: Path) -> Any:
    from datasets import disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetsError

    disable_progress_bars()
    with disk_errors(cache):
        try:
            return load_dataset(str(directory), config.dataset_config, cache_dir=str(cache))
        except (DatasetsError, ValueError, RuntimeError, TypeError, KeyError) as error:
            cause = error.__cause__ or error
            line = _line(cause).replace(str(directory), config.dataset_name)
            raise BadDataError(f"{config.dataset_name} cannot be loaded: {line}") from error


def saved_rows(directory: Path, config: PrepareConfig) -> list[Row]:
    """Return the rows of a folder written by ``datasets``' ``save_to_disk``.

    Raises:
        BadDataError: the folder is damaged or has no such split.
    """
    from datasets import load_from_disk

    try:
        data = load_from_disk(str(directory))
        return _dataset_rows(data, config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadDataError(f"{directory} is not a whole saved dataset: {_line(error)}") from error


def _dataset_rows(data: Any, config: PrepareConfig) -> list[Row]:
    if not isinstance(data, dict):
        return _rows_of(data, config.dataset_train_split, None)
    train, test = config.dataset_train_split, config.dataset_test_split
    for wanted in [split for split in (train, test) if split is not None]:
        if wanted not in data:
            raise BadDataError(
                f"{config.dataset_name} has no split {wanted!r}, only {', '.join(map(str, data))}: "
                "set dataset_train_split or dataset_test_split"
            )
    if test is None:
        return _rows_of(data[train], train, None)
    return _rows_of(data[train], train, "train") + _rows_of(data[test], test, "test")


def _rows_of(data: Any, name: str, split: str | None) -> list[Row]:
    names = {
        column: inner.names
        for column, feature in data.features.items()
        if hasattr(inner := getattr(feature, "feature", feature), "int2str")  # of a list, what it holds
    }
    rows = []
    for number, values in enumerate(data, 1):
        values |= {column: _named(values.get(column), labels) for column, labels in names.items()}
        rows.append(Row(f"{name} row {number}", f"{name}-{number}", values, split))
    return rows


def _named(value: Any, labels: Sequence[str]) -> Any:
    """Return the name of a label that is stored as its number, or those of a list; -1 is a withheld one."""
    if isinstance(value, list):
        return [_named(one, labels) for one in value]
    if not isinstance(value, int):
        return value
    return labels[value] if value >= 0 else None


@contextmanager
def hub_errors(name: str, revision: str) -> Iterator[None]:
    """Say in one line what the Hub or the way to it refused.

    Raises:
        UsageError, DeniedError, TransientError: see ``resolve``.
    """
    from huggingface_hub import errors

    at = f"{name} at {revision}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise DeniedError(
            f"{name} is gated: accept its terms on its Hub page, then set HF_TOKEN to a token that may read"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{name} has no revision {revision}: take a commit from its history") from error
    except (errors.RepositoryNotFoundError, errors.DisabledRepoError) as error:
        raise UsageError(
            f"the Hub has no repository {name}, or it is private: check the name, or set HF_TOKEN"
        ) from error
    except errors.HFValidationError as error:
        raise UsageError(f"{name!r} is neither a directory here nor a Hub id: {_line(error)}") from error
    except errors.OfflineModeIsEnabled as error:
        raise TransientError(f"{at} cannot be fetched: HF_HUB_OFFLINE is set, unset it") from error
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(at, error) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise DeniedError(f"the Hub refused {at} ({status}): check HF_TOKEN and its rights") from error
        if status == 404:
            raise UsageError(f"the Hub does not have {at}: check the name and the revision") from error
        raise TransientError(f"the Hub answered {status} for {at}: try again later") from error
    except (errors.HTTPError, ConnectionError, TimeoutError) as error:  # of the httpx it is built on
        raise TransientError(
            f"the Hub cannot be reached for {at}: check the network and try again"
        ) from error


def _unreachable(at: str, error: BaseException) -> TransientError | DeniedError:
    cause = error.__cause__
    if type(cause).__name__ == "OfflineModeIsEnabled":
        return TransientError(f"{at} cannot be fetched: HF_HUB_OFFLINE is set, unset it")
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status in (401, 403):
        return DeniedError(f"the Hub refused {at} ({status}): check HF_TOKEN and its rights")
    return TransientError(f"the Hub cannot be reached for {at}: check the network and try again")


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]

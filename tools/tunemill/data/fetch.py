"""The fetch stage: base weights from the Hub, from a directory, or made here.

Wherever they come from, they pass the same checks (``local.check_base``) before they become an
artifact. From the Hub the commit is resolved before anything runs and is part of the action
key, so a moved branch is fetched again and a pinned commit is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tunemill.data import hub, local, stdlib
from tunemill.data.config import MADE, FetchConfig
from tunemill.errors import UsageError
from tunemill.files import sha256_file
from tunemill.work import Facts, Work

HASHED = 64 << 20
"""Larger local files count by size and time of change: hashing 16 GB takes longer than a user waits."""


def check(config: FetchConfig) -> None:
    """Refuse what cannot be fetched, before anything is.

    Raises:
        UsageError: no such directory, no pinned revision, or an impossible shape.
    """
    name = config.model_name_or_path
    if name == MADE:
        _check_shape(config)
    elif _directory(name) is None:
        if name.startswith((".", "/", "~")):
            raise UsageError(f"no directory is at {name}: check the path, it is relative to {Path.cwd()}")
        if not config.model_revision:
            raise UsageError(
                f"model_revision is missing for {name}: pin a commit of its history on the Hub "
                "(or, for a local directory, check the path)"
            )


def reads(config: FetchConfig) -> Mapping[str, str]:
    """Return what the weights depend on beside the configuration.

    Raises:
        UsageError, DeniedError, TransientError: a branch or tag cannot be resolved on the Hub.
    """
    name = config.model_name_or_path
    if name == MADE:
        return {"python": stdlib.version()}
    directory = _directory(name)
    if directory is None:
        return {"commit": hub.resolve(name, str(config.model_revision), "model")}
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return {path.name: _identity(path) for path in files}


def fetch(work: Work[FetchConfig]) -> Facts:
    """Put a checked base model into ``work.output``.

    Raises:
        BadDataError: it is damaged, not safetensors, or asks for code.
        UsageError, DeniedError, TransientError: it is not there, not open to us, or unreachable.
    """
    config = work.config
    name = config.model_name_or_path
    directory = _directory(name)
    facts: Facts = {"name": name, "license": config.license}
    if name == MADE:
        from tunemill.data import tiny

        facts |= {"source": MADE, **tiny.make(work)}
    elif directory is not None:
        local.copy_model(directory, work.output, work.progress)
        facts |= {"source": "directory"}
    else:
        facts |= {"source": "hub", "commit": _from_hub(work)}
    if config.chat_template is not None:
        local.write_template(work.output, config.chat_template)
    return facts | local.check_base(work.output)


def _from_hub(work: Work[FetchConfig]) -> str:
    name = work.config.model_name_or_path
    commit = hub.resolve(name, str(work.config.model_revision), "model")
    files = {file.path: file for file in hub.list_files(name, commit, "model")}
    chosen = [files[path] for path in local.choose(files, name)]
    partial = work.scratch / commit
    hub.download(name, commit, "model", chosen, partial, work.progress)
    for file in chosen:
        (partial / file.path).rename(work.output / file.path)
    return commit


def _directory(name: str) -> Path | None:
    path = Path(name).expanduser()
    return path if path.is_dir() else None


def _identity(path: Path) -> str:
    status = path.stat()
    if status.st_size <= HASHED:
        return sha256_file(path)
    return f"{status.st_size} bytes at {status.st_mtime_ns} ns"


def _check_shape(config: FetchConfig) -> None:
    if config.hidden_size % config.num_attention_heads:
        raise UsageError(
            f"hidden_size {config.hidden_size} is no multiple of num_attention_heads "
            f"{config.num_attention_heads}"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise UsageError(
            f"num_attention_heads {config.num_attention_heads} is no multiple of num_key_value_heads "
            f"{config.num_key_value_heads}"
        )

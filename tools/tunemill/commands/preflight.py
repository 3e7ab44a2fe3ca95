"""``tunemill convert --check``: whether a model can become a GGUF, said before anyone trains it."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import click

from tunemill import options
from tunemill.errors import UsageError
from tunemill.progress import Progress
from tunemill.recipe import Choice, available, resolve
from tunemill.signals import Signals
from tunemill.stages import known_keys, load_stage
from tunemill.store import Store

CHECKED = ("base", "merged")
"""Kinds of artifacts that hold a whole model as transformers reads it."""


def check_model(model: str, store_url: str, as_json: bool, signals: Signals) -> None:
    """Print a line for each finding about a recipe's model, a directory's or an artifact's.

    Raises:
        BadDataError: a finding is not fine.
        UsageError: there is no such model, or it is made by fetch and has not been yet.
    """
    from tunemill.gguf.preflight import preflight, refuse

    with tempfile.TemporaryDirectory(prefix="tunemill-") as temporary:
        scratch = Path(temporary)
        findings = preflight(_directory(model, store_url, scratch), scratch, signals.stop)
    if as_json:
        listed = [{"subject": one.subject, "fine": one.fine, "said": one.said} for one in findings]
        click.echo(json.dumps({"model": model, "findings": listed}))
    else:
        for finding in findings:
            click.echo(str(finding))
    refuse(findings)


def _directory(model: str, store_url: str, scratch: Path) -> Path:
    """Return where the model's files are, or put them there: no weights, where that can be."""
    if Path(model).is_dir():
        return Path(model)
    store = options.open_the_store(store_url)
    if model not in available("models") and not model.endswith((".yaml", ".yml")):
        return _pulled(store, model, scratch)
    recipe, fetch = resolve(Choice(model=model), known_keys()), load_stage("fetch")
    config = recipe.configure(fetch)
    if store.find(reference := recipe.format(fetch.output, config)) is not None:
        return _pulled(store, reference, scratch)
    return _fetched(config, scratch)


def _pulled(store: Store, reference: str, scratch: Path) -> Path:
    artifact = store.resolve(reference)
    if artifact.kind not in CHECKED:
        raise UsageError(f"{artifact.reference} is {artifact.kind}, expected {' or '.join(CHECKED)}")
    small = tuple(file for file in artifact.files if not file.path.endswith(".safetensors"))
    store.pull(replace(artifact, files=small), scratch / "model", Progress())
    return scratch / "model"


def _fetched(config: object, scratch: Path) -> Path:
    """Get a model that is in no store yet: from its directory, or from the Hub all but the weights."""
    from tunemill.data.config import MADE, FetchConfig
    from tunemill.data.fetch import check
    from tunemill.data.hub import download, list_files
    from tunemill.data.hub import resolve as resolve_commit
    from tunemill.data.local import choose, write_template

    assert isinstance(config, FetchConfig)
    check(config)
    name, target = config.model_name_or_path, scratch / "model"
    if name == MADE:
        raise UsageError("this model is made by fetch and is not in the store yet: run tunemill fetch first")
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    commit = resolve_commit(name, str(config.model_revision), "model")
    files = {file.path: file for file in list_files(name, commit, "model")}
    small = [files[path] for path in choose(files, name) if not path.endswith(".safetensors")]
    download(name, commit, "model", small, target, Progress())
    if config.chat_template is not None:
        write_template(target, config.chat_template)
    return target

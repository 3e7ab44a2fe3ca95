"""``tunemill store``: look at artifacts, move them, and keep their store in order."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tunemill import options
from tunemill.errors import UsageError
from tunemill.progress import Progress

if TYPE_CHECKING:
    from tunemill.store import Artifact, Store
    from tunemill.store.collect import Plan
    from tunemill.store.verify import Verdict

LOOKUPS = 8  # at once; over a network each takes several round trips
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def examples(*lines: str) -> str:
    """Return the end of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  tunemill store {line}" for line in lines)


@click.group(epilog=examples("ls", "log tiny-stdlib/report-q4_k_m"))
def store() -> None:
    """Look at, move and check artifacts.

    A REFERENCE is name (the newest), name:tag or name@sha256:… as every command prints it.
    """


@store.command(epilog=examples("create", "create --store s3://models/llama"))
@options.store
@options.json
def create(store_url: str, as_json: bool) -> None:
    """Make the directory or the bucket of --store, unless it is there.

    A bucket is made at the configured endpoint, in the region of AWS_DEFAULT_REGION.
    """
    from tunemill.store import create_store

    made, created = create_store(store_url)
    where = f" at {made.backend.endpoint}" if made.backend.endpoint else ""
    Progress().say(f"made {made.url}{where}" if created else f"{made.url}{where} is there already")
    _result({"url": made.url, "endpoint": made.backend.endpoint, "created": created}, "url", as_json)


@store.command(epilog=examples("ls", "ls tiny-stdlib/adapter --store s3://models/llama"))
@click.argument("name", required=False)
@options.store
@options.json
def ls(name: str | None, store_url: str, as_json: bool) -> None:
    """List artifacts, or all that one NAME has meant."""
    opened = options.open_the_store(store_url)
    if name is None:
        with ThreadPoolExecutor(LOOKUPS) as pool:
            rows = list(pool.map(lambda each: _row(opened, each), opened.names()))
        _show(rows, as_json, lambda row: (row["name"], row["kind"], _size(row["size"]), row["digest"][:19]))
        return
    opened.resolve(name)
    rows = _history(opened, name)
    _show(rows, as_json, lambda row: (row["name"], row["digest"][:19], row["created"], " ".join(row["tags"])))


@store.command(epilog=examples("show base/tiny", "show tiny-stdlib/adapter:final --json"))
@click.argument("reference")
@options.store
@options.json
def show(reference: str, store_url: str, as_json: bool) -> None:
    """Show one artifact: its files, facts, configuration and where each value came from."""
    opened = options.open_the_store(store_url)
    artifact = opened.resolve(reference)
    made = opened.provenance(artifact)
    if as_json:
        values = {"reference": artifact.reference, **dataclasses.asdict(artifact)}
        _print_json({**values, "provenance": dataclasses.asdict(made)})
        return
    _lines([artifact.reference, f"kind {artifact.kind}, {_size(artifact.size)}, content {artifact.content}"])
    _lines(
        [f"made by {made.stage} {made.tool_version}, {_date(made.finished)}, action {made.action_key[:16]}"]
    )
    _section("files", ((file.path, _size(file.size), file.digest[:12]) for file in artifact.files))
    _section("inputs", sorted(made.inputs.items()))
    _section("facts", ((key, _text(value)) for key, value in sorted(artifact.facts.items())))
    origins = made.origins
    _section("config", ((k, _text(value), origins.get(k, "")) for k, value in sorted(made.config.items())))


@store.command(epilog=examples("log tiny-stdlib/report-q4_k_m", "log tiny-stdlib/adapter --json"))
@click.argument("reference")
@options.store
@options.json
def log(reference: str, store_url: str, as_json: bool) -> None:
    """Show what an artifact was made from, down to base weights and data."""
    from tunemill.store.lineage import lineage, lines

    tree = lineage(options.open_the_store(store_url), reference)
    if as_json:
        _print_json(tree.as_json())
    else:
        _lines(lines(tree))


@store.command(epilog=examples("diff one/report-f16 two/report-f16", "diff base/tiny:v1 base/tiny --json"))
@click.argument("first")
@click.argument("second")
@options.store
@options.json
def diff(first: str, second: str, store_url: str, as_json: bool) -> None:
    """Show what differs between two artifacts and between those they were made from.

    Of two GGUF models also the tensors, which takes pulling both, and the labels they choose.
    """
    from tunemill.commands import quantizations
    from tunemill.store.diff import diff as differences_of
    from tunemill.store.diff import lines

    opened = options.open_the_store(store_url)
    differences = differences_of(opened, first, second)
    models = quantizations.compare(opened, opened.resolve(first), opened.resolve(second), Progress())
    if as_json:
        record = {"differences": [dataclasses.asdict(each) for each in differences]}
        _print_json(record | (models or {}))
    else:
        _lines(lines(differences) if differences else ["no difference"])
        _lines(quantizations.lines(models) if models else [])


@store.command(epilog=examples("pull tiny-stdlib/gguf-q4_k_m model", "pull base/tiny:v1 base --json"))
@click.argument("reference")
@click.argument("destination", type=click.Path(path_type=Path))
@options.store
@options.json
def pull(reference: str, destination: Path, store_url: str, as_json: bool) -> None:
    """Fetch an artifact's files, verified, into DESTINATION, which appears whole or not at all.

    The files are read-only, since they may share their bytes with the cache.
    """
    opened = options.open_the_store(store_url)
    artifact = opened.resolve(reference)
    opened.pull(artifact, destination, Progress())
    _result({"reference": artifact.reference, "path": str(destination)}, "path", as_json)


@store.command(
    epilog=examples(
        "push ./weights base/mine --kind base --tag v1",
        "push texts mine/data --kind data --input base=base/tiny",
    )
)
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("name")
@click.option(
    "--kind", required=True, metavar="KIND", help="What it is: base, data, adapter, merged, gguf, …"
)
@click.option(
    "--tag", "tags", metavar="TAG", multiple=True, help="A name that never changes. May be repeated."
)
@options.inputs
@options.store
@options.json
def push(
    directory: Path,
    name: str,
    kind: str,
    tags: tuple[str, ...],
    inputs: tuple[str, ...],
    store_url: str,
    as_json: bool,
) -> None:
    """Publish the files of DIRECTORY as an artifact called NAME (project/kind)."""
    from tunemill.host import this_host
    from tunemill.store.push import draft

    opened = options.open_the_store(store_url)
    made = draft(opened, directory, name, kind, tags, _roles(inputs), this_host().record())
    artifact = opened.publish(made, Progress())
    _result(_summary(artifact), "reference", as_json)


@store.command(epilog=examples("tag tiny-stdlib/adapter best", "tag base/tiny@sha256:… v1"))
@click.argument("reference")
@click.argument("tag")
@options.store
@options.json
def tag(reference: str, tag: str, store_url: str, as_json: bool) -> None:
    """Give an artifact a TAG, which never changes and is never collected."""
    opened = options.open_the_store(store_url)
    artifact = opened.resolve(reference)
    opened.tag(artifact.reference, tag)
    _result({**_summary(artifact), "tagged": f"{artifact.name}:{tag}"}, "tagged", as_json)


@store.command(epilog=examples("verify", "verify tiny-stdlib/report-q4_k_m --store s3://models/llama"))
@click.argument("references", nargs=-1)
@options.store
@options.json
def verify(references: tuple[str, ...], store_url: str, as_json: bool) -> None:
    """Read and hash REFERENCES and all they were made from; without any, everything."""
    from tunemill.store.verify import refuse_broken, verify_names
    from tunemill.store.verify import verify as read_and_hash

    opened = options.open_the_store(store_url)
    verdict = read_and_hash(opened, list(references) or verify_names(opened), Progress())
    _show_verdict(verdict, as_json)
    refuse_broken(verdict)


@store.command(epilog=examples("gc", "gc --delete --grace 2d"))
@click.option("--delete", is_flag=True, help="Delete; otherwise only say what would be deleted.")
@click.option(
    "--grace",
    metavar="AGE",
    default="7d",
    show_default=True,
    help="Keep what is younger by the server's clock: a number and s, m, h, d or w.",
)
@options.store
@options.json
def gc(delete: bool, grace: str, store_url: str, as_json: bool) -> None:
    """Find what nothing names any more: old checkpoints, killed uploads, untagged leftovers.

    What a tag, a branch or a running publish names stays, and whatever that was made from.
    """
    from tunemill.store.collect import plan, sweep

    opened = options.open_the_store(store_url)
    collect = sweep if delete else plan
    _show_plan(collect(opened.backend, _age(grace), Progress()), delete, as_json)


@store.command(epilog=examples("doctor", "doctor --store s3://models/llama --json"))
@options.store
@options.json
def doctor(store_url: str, as_json: bool) -> None:
    """Prove on the live store that it keeps every promise the protocol needs."""
    from tunemill.store.doctor import examine, refuse_unfit

    opened = options.open_the_store(store_url)
    findings = examine(opened.backend, Progress())
    _show(
        [dataclasses.asdict(finding) for finding in findings],
        as_json,
        lambda row: (row["state"], row["check"], row["detail"]),
    )
    refuse_unfit(opened.url, findings)


@store.command(epilog=examples("export base/tiny layout", "export tiny-stdlib/gguf-q4_k_m layout --name q4"))
@click.argument("reference")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", help="What the layout's index calls it.  [default: tag or 'latest']")
@options.store
@options.json
def export(reference: str, destination: Path, name: str | None, store_url: str, as_json: bool) -> None:
    """Write an artifact as an OCI image layout, for skopeo, oras and registries."""
    from tunemill.store.export import export as write_layout
    from tunemill.store.names import parse_reference

    opened = options.open_the_store(store_url)
    artifact = opened.resolve(reference)
    called = name or parse_reference(reference).tag or "latest"
    write_layout(opened, artifact, called, destination, Progress())
    summary = {"reference": artifact.reference, "path": str(destination), "name": called}
    _result(summary, "path", as_json)


def _row(opened: Store, name: str) -> dict[str, Any]:
    """Return one line of ``ls``; a name that has only tags shows the first of them."""
    tags = opened.tags(name)
    artifact = opened.find(name) or opened.resolve(f"{name}:{tags[0]}")
    return {**_summary(artifact), "tags": tags}


def _history(opened: Store, name: str) -> list[dict[str, Any]]:
    named: dict[str, list[str]] = {}
    for each in opened.tags(name):
        named.setdefault(opened.resolve(f"{name}:{each}").digest, []).append(each)
    rows: list[dict[str, Any]] = []
    for revision in opened.history(name):
        tags = named.pop(revision.digest, [])
        rows.append(
            {"name": name, "digest": revision.digest, "created": _date(revision.created), "tags": tags}
        )
    rows += [{"name": name, "digest": key, "created": "", "tags": tags} for key, tags in named.items()]
    return rows


def _summary(artifact: Artifact) -> dict[str, Any]:
    values = ("name", "digest", "kind", "size", "content", "reference")
    return {key: getattr(artifact, key) for key in values}


def _roles(inputs: Iterable[str]) -> dict[str, str]:
    roles = {}
    for text in inputs:
        role, equals, reference = text.partition("=")
        if not (role and equals and reference):
            raise UsageError(f"--input {text}: expected ROLE=REFERENCE, as in base=base/tiny")
        roles[role] = reference
    return roles


def _age(text: str) -> timedelta:
    found = re.fullmatch(r"(\d{1,6})([smhdw]?)", text)
    if not found or (found[1] != "0" and not found[2]):
        raise UsageError(f"--grace {text}: expected a number and s, m, h, d or w, as in 7d")
    return timedelta(**{UNITS[found[2] or "s"]: int(found[1])})


def _show_verdict(verdict: Verdict, as_json: bool) -> None:
    if as_json:
        _print_json(dataclasses.asdict(verdict))
        return
    _lines(f"{broken.artifact}: {broken.part} {broken.problem}" for broken in verdict.broken)
    counts = f"{len(verdict.artifacts)} artifacts, {verdict.blobs} blobs, {_size(verdict.size)}"
    _lines([f"{counts}, {len(verdict.broken)} broken"])


def _show_plan(found: Plan, deleted: bool, as_json: bool) -> None:
    if as_json:
        groups: Mapping[str, Iterable[Any]] = {
            "superseded": found.superseded,
            "objects": found.objects,
            "uploads": found.uploads,
            "leftovers": found.leftovers,
        }
        keys = {name: [entry.key for entry in group] for name, group in groups.items()}
        _print_json({"deleted": deleted, "size": found.size, **keys})
        return
    did = "deleted" if deleted else "would delete"
    _lines(
        [
            f"{did} {len(found.objects)} objects of {_size(found.size)}, "
            f"{len(found.superseded)} steps of checkpoint branches, {len(found.uploads)} abandoned uploads, "
            f"{len(found.leftovers)} leftovers of ended processes"
        ]
    )
    if not deleted and (found.objects or found.superseded or found.uploads or found.leftovers):
        click.echo("nothing was deleted: add --delete", err=True)


def _show(
    rows: list[dict[str, Any]], as_json: bool, columns: Callable[[dict[str, Any]], tuple[str, ...]]
) -> None:
    if as_json:
        _print_json(rows)
    else:
        _table(columns(row) for row in rows)


def _section(title: str, rows: Iterable[tuple[str, ...]]) -> None:
    listed = list(rows)
    if listed:
        _lines([f"{title}:"])
        _table(("", *row) for row in listed)


def _table(rows: Iterable[tuple[str, ...]]) -> None:
    listed = list(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*listed, strict=True)]
    for row in listed:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _result(values: dict[str, Any], last: str, as_json: bool) -> None:
    """Print the result: one value as text, all of them as JSON."""
    if as_json:
        _print_json(values)
    else:
        click.echo(values[last])


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, sort_keys=True, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _lines(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("\n", "\\n")


def _date(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S}Z"


def _size(size: int) -> str:
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"

"""``tunemill doctor``: what this machine and the store lack."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from tunemill import options
from tunemill.doctor import Finding, examine, report
from tunemill.errors import ConfigurationError, TunemillError
from tunemill.host import this_host


@click.command(epilog="\b\nExamples:\n  tunemill doctor\n  tunemill doctor --store s3://bucket/prefix --json")
@options.store
@options.json
def doctor(store_url: str, as_json: bool) -> None:
    """Say what is missing here and how to get it."""
    findings = [*examine(Path.cwd()), _host(), _store(store_url)]
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings]))
    else:
        click.echo(report(findings))
    missing = [finding.name for finding in findings if finding.state == "missing"]
    if missing:
        raise ConfigurationError(f"missing: {', '.join(missing)}; what to do stands beside each")


def _host() -> Finding:
    return Finding("host class", "ok", this_host().host_class)


def _store(url: str) -> Finding:
    """Whether the store can be reached; 'tunemill store doctor' looks at its promises."""
    if url == options.DEFAULT_STORE and not Path(url).exists():
        return Finding("store", "note", f"{url} is made by the first stage that runs")
    try:
        names = options.open_the_store(url).names()
    except TunemillError as error:
        return Finding("store", "missing", str(error), "see 'tunemill store doctor'")
    return Finding("store", "ok", f"{url} holds {len(names)} names")

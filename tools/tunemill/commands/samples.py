"""``tunemill infer --id``: single rows with their prompts, answers and true labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click

from tunemill.errors import UsageError
from tunemill.progress import Progress
from tunemill.signals import Signals
from tunemill.stage import Plan, check, refuse_foreign, rehearse
from tunemill.store import Store

MOST_LABELS = 5  # shown of a row


def show(store: Store, planned: Plan, ids: Sequence[str], as_json: bool, signals: Signals) -> None:
    """Answer rows and print them; nothing is published.

    Raises:
        UsageError: an input is missing, or the split has no such row.
    """
    from tunemill.infer.samples import answer_samples

    if getattr(planned.config, "joins", False):
        raise UsageError("--id answers rows, and this configuration joins shards: leave shard_count out")
    if planned.missing:
        raise UsageError("; ".join(planned.missing.values()))
    check(planned)
    refuse_foreign(replace(planned, existing=None))
    with rehearse(store, planned, Progress(quiet=as_json)) as work:
        found = list(answer_samples(replace(work, stop=signals.stop), list(dict.fromkeys(ids))))
    records = [_record(sample) for sample in found]
    click.echo(json.dumps(records, ensure_ascii=False) if as_json else "\n\n".join(map(_text, records)))


def _record(sample: Any) -> dict[str, Any]:
    row, answer = sample.row, sample.answer
    return {
        "id": row.id,
        "prompt": sample.prompt,
        "answer": answer.label,
        "gold": row.gold,
        "probabilities": dict(sample.probabilities),
        "samples": list(answer.samples or ()),
        "error": answer.error,
    }


def _text(record: dict[str, Any]) -> str:
    likeliest = [f"  {share:.4f}  {label}" for label, share in record["probabilities"].items()][:MOST_LABELS]
    others = [f"  also   {text}" for text in record["samples"]]
    answer = record["answer"] if record["error"] is None else f"none ({record['error']})"
    lines = [
        f"id      {record['id']}",
        f"prompt  {record['prompt']}",
        f"answer  {answer}",
        *likeliest,
        *others,
    ]
    return "\n".join([*lines, f"gold    {record['gold'] if record['gold'] is not None else 'unknown'}"])

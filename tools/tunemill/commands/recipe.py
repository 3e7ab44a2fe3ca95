"""``tunemill recipe``: what there is to choose from, and what a choice resolves to."""

from __future__ import annotations

import json
from typing import Any

import click

from tunemill import options
from tunemill.recipe import Choice, available, describe, resolve
from tunemill.stages import known_keys


@click.group(
    epilog="\b\nExamples:\n  tunemill recipe list\n  tunemill recipe show --model tiny --task stdlib"
)
def recipe() -> None:
    """List recipes, or show one resolved."""


@recipe.command(
    "list", epilog="\b\nExamples:\n  tunemill recipe list\n  tunemill recipe list --json | jq .models"
)
@options.json
def list_recipes(as_json: bool) -> None:
    """List the models and tasks that come with Tunemill."""
    found = {kind: {name: describe(kind, name) for name in available(kind)} for kind in ("models", "tasks")}
    if as_json:
        click.echo(json.dumps(found))
        return
    for kind, recipes in found.items():
        click.echo(f"{kind}:")
        for name, text in recipes.items():
            click.echo(f"  {name:<14} {text}")


@recipe.command(
    "show",
    epilog="\b\nExamples:\n  tunemill recipe show --model tiny --task stdlib\n"
    "  tunemill recipe show --model llama3 --task cap --set learning_rate=1e-4",
)
@options.recipe
@options.json
def show(as_json: bool, recipe_file: str | None, **choice: Any) -> None:
    """Show every value of a combined recipe with its origin."""
    resolved = resolve(Choice(file=recipe_file, **choice), known_keys())
    if as_json:
        values = {
            key: {"value": setting.value, "origin": setting.origin}
            for key, setting in resolved.settings.items()
        }
        click.echo(json.dumps({**resolved.names, "settings": values}))
        return
    for key, name in resolved.names.items():
        click.echo(f"# {key}: {name}")
    for key, setting in sorted(resolved.settings.items()):
        click.echo(f"{key}: {json.dumps(setting.value, ensure_ascii=False)}  # {setting.origin}")

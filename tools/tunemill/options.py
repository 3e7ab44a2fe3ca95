"""Every option that more than one command has, declared once.

So that ``--store`` is spelled, documented and defaulted alike everywhere. Each function here is a
decorator for a click command; what an option means is decided by the command that takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from tunemill.store import Store

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Command], Command]

DEFAULT_STORE = ".tunemill/store"

store: Decorator[Any] = click.option(
    "--store",
    "store_url",
    metavar="URL",
    envvar="TUNEMILL_STORE",
    default=DEFAULT_STORE,
    show_default=True,
    show_envvar=True,
    help="Where artifacts are: a directory or s3://bucket/prefix.",
)
json: Decorator[Any] = click.option(
    "--json", "as_json", is_flag=True, help="Print one line of JSON as the result instead of text."
)
model: Decorator[Any] = click.option(
    "--model", metavar="NAME", envvar="TUNEMILL_MODEL", help="Model recipe: a name or a YAML file."
)
task: Decorator[Any] = click.option(
    "--task", metavar="NAME", envvar="TUNEMILL_TASK", help="Task recipe: a name or a YAML file."
)
run: Decorator[Any] = click.option(
    "--run", metavar="NAME", envvar="TUNEMILL_RUN", help="Project of the artifacts.  [default: MODEL-TASK]"
)
recipe_file: Decorator[Any] = click.option(
    "--recipe",
    "recipe_file",
    metavar="FILE",
    help="YAML file of further keys, over model and task, under --set.",
)
settings: Decorator[Any] = click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="Set one recipe key; the value is YAML. May be repeated.",
)
inputs: Decorator[Any] = click.option(
    "--input",
    "inputs",
    metavar="ROLE=REF",
    multiple=True,
    help="Take this artifact for an input: name, name:tag or name@sha256:… May be repeated.",
)
publish_anyway: Decorator[Any] = click.option(
    "--publish-anyway",
    is_flag=True,
    help="Publish a model that is beyond its parity limits, and record that.",
)
requantize: Decorator[Any] = click.option(
    "--requantize",
    is_flag=True,
    help="Where another kind of host quantized the model, do it here first, from the same F16.",
)
reprove: Decorator[Any] = click.option(
    "--reprove",
    is_flag=True,
    help="Where another kind of host quantized the model, prove it here by its probe set first.",
)
types: Decorator[Any] = click.option(
    "--types",
    metavar="TYPES",
    help="Make several, with commas between them, and show size, divergence and speed side by side.",
)
memory_budget: Decorator[Any] = click.option(
    "--memory-budget", metavar="SIZE", help="With --types: recommend the best that fits, for example 6GB."
)
context: Decorator[Any] = click.option(
    "--context",
    metavar="TOKENS",
    type=click.IntRange(min=1),
    help="With --memory-budget: tokens of prompt and answer.  [default: 4096, or what it was trained for]",
)
check_model: Decorator[Any] = click.option(
    "--check",
    "check_model",
    metavar="MODEL",
    help="Convert nothing; say whether this model can be: a recipe, a directory or an artifact.",
)
join_parts: Decorator[Any] = click.option(
    "--join",
    "join_parts",
    metavar="FILE",
    help="Convert nothing; join the GGUF that this file is a part of into one file beside it.",
)
ids: Decorator[Any] = click.option(
    "--id",
    "ids",
    metavar="ID",
    multiple=True,
    help="Publish nothing; answer this row and show prompt, answer and true label. May be repeated.",
)
dry_run: Decorator[Any] = click.option(
    "--dry-run", is_flag=True, help="Show configuration, inputs and whether it would run; run nothing."
)

cluster: Decorator[Any] = click.option(
    "--cluster",
    "cluster_file",
    metavar="FILE",
    envvar="TUNEMILL_CLUSTER",
    show_envvar=True,
    help="What is known of the cluster.  [default: cluster.yaml]",
)


def recipe(command: Command) -> Command:
    """Add what decides a resolved recipe: model, task, run, file and settings."""
    for option in reversed((model, task, run, recipe_file, settings)):
        command = option(command)
    return command


def open_the_store(url: str) -> Store:
    """Open the store of ``--store``; the default directory is made when it is not there.

    Raises:
        ConfigurationError: another store does not exist, or is no store.
        DeniedError: it refuses the credentials.
    """
    from tunemill.store import open_store

    return open_store(url, create=url == DEFAULT_STORE)

"""The reference of the command line, ``docs/cli.md``, written from the commands' own help.

``python docs/cli.py > docs/cli.md`` writes it; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator

import click

from tunemill.cli import tree

WIDTH = 100  # columns of the help as it stands in the page
HEADER = """# Commands

Written by `python docs/cli.py > docs/cli.md`; change the commands, not this page. Results go to
stdout, with the reference of what was made as the last line; everything else goes to stderr.
[exit-codes.md](exit-codes.md) lists what commands return.
"""


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEADER, *(section(context) for context in contexts())])


def contexts() -> Iterator[click.Context]:
    """Yield a context for every command, groups before what is in them."""
    return _below(tree.make_context("tunemill", [], resilient_parsing=True, terminal_width=WIDTH))


def section(context: click.Context) -> str:
    """Return one command's help under a heading."""
    return f"## {context.command_path}\n\n```text\n{context.command.get_help(context).rstrip()}\n```\n"


def _below(context: click.Context) -> Iterator[click.Context]:
    yield context
    command = context.command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            if found is not None:
                yield from _below(found.make_context(name, [], parent=context, resilient_parsing=True))


if __name__ == "__main__":
    click.echo(page(), nl=False)

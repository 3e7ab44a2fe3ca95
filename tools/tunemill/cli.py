"""The command tree, and the one place where errors become exit codes.

Commands are imported when they are called for, so that ``tunemill --help`` stays fast: their
one-line summaries stand here and in ``stages.py``, and a test compares them with the commands'
own. An expected error is one line on stderr; anything else is a bug, whose traceback is shown
with ``--debug`` or ``TUNEMILL_DEBUG=1``.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from tunemill import __version__
from tunemill.errors import ConfigurationError, DeniedError, Interrupted, TransientError, TunemillError
from tunemill.group import speaks
from tunemill.image import arguments_in_image
from tunemill.signals import handled
from tunemill.stages import LISTED

BUG = 70  # sysexits' EX_SOFTWARE
BROKEN_PIPE = 141  # what a shell reports for a writer whose reader has gone
COMMANDS = {
    "pipeline": ("tunemill.commands.pipeline:pipeline", "Run all stages in order, reusing what exists"),
    "compare": ("tunemill.commands.compare:compare", "Set models side by side on the same rows"),
    "sweep": ("tunemill.commands.sweep:sweep", "Train on more and more rows, and plot the learning curve"),
    "pull": ("tunemill.commands.pull:pull", "Fetch a finished GGUF, verified, and say how to run it"),
    "serve": ("tunemill.commands.serve:serve", "Serve a GGUF to OpenAI's clients"),
    "submit": (
        "tunemill.commands.submit:submit",
        "Run a stage or the pipeline as Jobs in a Kubernetes cluster, and follow them",
    ),
    "status": (
        "tunemill.commands.jobs:status",
        "List the Jobs in the cluster, or say how one of them is, and why it waits",
    ),
    "logs": (
        "tunemill.commands.jobs:logs",
        "Show what a Job's newest pod has written, or follow it to its end",
    ),
    "wait": ("tunemill.commands.jobs:wait", "Wait until a Job has ended, and end with its exit code"),
    "cancel": (
        "tunemill.commands.jobs:cancel",
        "End a Job: its stage saves what it can, and the same submit goes on from there",
    ),
    "cluster": (
        "tunemill.commands.cluster:cluster",
        "Look at a Kubernetes cluster and say how to submit to it",
    ),
    "store": ("tunemill.commands.store:store", "Look at, move and check artifacts"),
    "recipe": ("tunemill.commands.recipe:recipe", "List recipes, or show one resolved"),
    "doctor": ("tunemill.commands.doctor:doctor", "Say what is missing here and how to get it"),
}

log = logging.getLogger("tunemill")


class Lazy(click.Group):
    """A group that imports a command's module when the command is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return stages in their order, then the rest."""
        return [*LISTED, *COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name in LISTED:
            from tunemill.commands.stages import stage_command

            return stage_command(cmd_name)
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing any."""
        with formatter.section("Stages"):
            formatter.write_dl([(name, listed.summary) for name, listed in LISTED.items()])
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group(
    cls=Lazy,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="\b\nExamples:\n  tunemill pipeline --model tiny --task stdlib\n  tunemill train --help",
)
@click.version_option(__version__, prog_name="tunemill")
@click.option("--debug", is_flag=True, envvar="TUNEMILL_DEBUG", help="Show tracebacks.")
@click.option("--quiet", is_flag=True, envvar="TUNEMILL_QUIET", help="Talk only about errors.")
def tree(debug: bool, quiet: bool) -> None:
    """Fine-tune an open language model, quantize it, and judge it, step by step through one store."""
    if debug:
        log.setLevel(logging.DEBUG)
    elif quiet:
        log.setLevel(logging.ERROR)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    _talk_on_stderr()
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code, after a line on stderr when it failed."""
    try:
        with handled() as signals:
            chosen = list(arguments_in_image(arguments))
            result = tree.main(args=chosen, prog_name="tunemill", standalone_mode=False, obj=signals)
    except click.ClickException as error:
        return _click_failure(error)
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _fail(Interrupted("interrupted"))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or its flush at exit complains
        return BROKEN_PIPE
    except Exception as error:  # noqa: BLE001 - the one place that maps errors to exit codes
        return _failure(error)
    return result if isinstance(result, int) else 0


def _failure(error: Exception) -> int:
    if isinstance(error, TunemillError):
        return _fail(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _fail(TransientError(f"no space left on the disk: {error}; free some and run it again"))
    if isinstance(error, PermissionError):
        return _fail(DeniedError(f"no permission for {error.filename}: change its mode or its owner"))
    if isinstance(error, MemoryError):
        return _fail(ConfigurationError("out of memory: take a smaller batch or a machine with more"))
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("tunemill"):
        return _fail(_missing(error))
    log.error(
        "tunemill: bug: %s: %s (run again with TUNEMILL_DEBUG=1 for the traceback)",
        type(error).__name__,
        _one_line(error),
        exc_info=error if log.isEnabledFor(logging.DEBUG) else None,
    )
    return BUG


def _fail(error: TunemillError) -> int:
    log.error(
        "tunemill: %s",
        _one_line(error),
        exc_info=error if log.isEnabledFor(logging.DEBUG) else None,
    )
    return error.exit_code


def _missing(error: ModuleNotFoundError) -> ConfigurationError:
    return ConfigurationError(
        f"this needs the Python package '{error.name}', which is not installed here: "
        "install the stage's extra (pip install 'tunemill[all]'), or see 'tunemill doctor'"
    )


def _click_failure(error: click.ClickException) -> int:
    """Say what click found wrong in one line, with where help is."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return 2
    where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "tunemill"
    log.error("tunemill: %s (see '%s --help')", _one_line(error.format_message().rstrip(".")), where)
    return 2


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _talk_on_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.INFO if speaks() else logging.WARNING)
    log.propagate = False
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own bars would tear ours and fill a cluster's log


if __name__ == "__main__":
    main()

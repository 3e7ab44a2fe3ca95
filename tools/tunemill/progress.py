"""Progress of long work: a bar on a terminal, a plain log line now and then elsewhere.

One ``Progress`` is passed down into library code, which only reports counts; how they are
shown is decided here. Everything goes to stderr, so stdout stays the command's result.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

LOG_EVERY_SECONDS = 10.0  # one line per task and 10 s keeps a cluster's log readable
REDRAW_SECONDS = 0.1
ENOUGH_TO_FORETELL = 0.01  # share done before the remaining time is said; a file's header alone says nothing

log = logging.getLogger("tunemill")


class Task:
    """One counted piece of work; ``advance`` may be called from several threads."""

    def __init__(
        self,
        name: str,
        total: float | None,
        unit: str,
        show: Callable[[Task, bool], None],
    ) -> None:
        self.name = name
        self.total = total
        self.unit = unit
        self.done = 0.0
        self.note = ""
        self.started = time.monotonic()
        self.before = 0.0
        """What was done before the task began, which says nothing of its rate."""
        self.logged = -1.0
        """What was done when its last log line was written."""
        self._show = show

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Count ``amount`` more units as done, with an optional note such as the loss."""
        self.done += amount
        if note is not None:
            self.note = note
        self._show(self, False)

    def skip(self, amount: float) -> None:
        """Count ``amount`` units as done by an earlier run."""
        self.done += amount
        self.before += amount

    def line(self) -> str:
        """``train 12/40 steps, 3.1/s, 9 s left, loss 1.23`` without a newline."""
        elapsed = max(time.monotonic() - self.started, 1e-9)
        rate = (self.done - self.before) / elapsed
        bare = "B" if self.unit == "B" else ""  # bytes keep their unit, counts name it once
        parts = [f"{self.name} {_count(self.done, self.unit)}"]
        if self.total:
            parts[0] = f"{self.name} {_count(self.done, bare)}/{_count(self.total, self.unit)}"
        if rate:
            parts.append(f"{_count(rate, bare)}/s")
            if self.total and self.total * ENOUGH_TO_FORETELL <= self.done < self.total:
                parts.append(f"{(self.total - self.done) / rate:.0f} s left")
        if self.note:
            parts.append(self.note)
        return ", ".join(parts)


class Progress:
    """Where progress is shown. ``quiet`` shows nothing but log lines of finished tasks."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._bar = not quiet and self._stream.isatty()
        self._quiet = quiet
        self._shown = 0.0

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        """Show a task while the block runs. ``unit`` is a plural noun, or ``B`` for bytes."""
        task = Task(name, total, unit, self._show)
        self._shown = time.monotonic()
        try:
            yield task
        finally:
            self._show(task, True)

    def say(self, message: str) -> None:
        """Log one line of plain information."""
        self._clear()
        log.info(message)

    def _show(self, task: Task, final: bool) -> None:
        now = time.monotonic()
        if self._bar:
            if final or now - self._shown >= REDRAW_SECONDS:
                self._shown = now
                self._stream.write(f"\r\033[K{task.line()}" + ("\n" if final else ""))
                self._stream.flush()
        elif final and (self._quiet or now - task.started < 1 or task.logged == task.done):
            return  # sub-second tasks and repetitions would only be noise in a log
        elif not self._quiet and (final or now - self._shown >= LOG_EVERY_SECONDS):
            self._shown = now
            task.logged = task.done
            log.info(task.line())

    def _clear(self) -> None:
        if self._bar:
            self._stream.write("\r\033[K")
            self._stream.flush()


def _count(value: float, unit: str) -> str:
    if unit == "B":
        for prefix in ("", "k", "M", "G"):
            if value < 1000:
                return f"{value:.3g} {prefix}B"
            value /= 1000
        return f"{value:.3g} TB"
    number = f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
    return f"{number} {unit}".rstrip()

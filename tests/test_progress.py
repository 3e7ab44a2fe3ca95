"""Progress is a bar on a terminal and log lines elsewhere, never anything on stdout."""

from __future__ import annotations

import io
import logging

import pytest

from tunemill import progress
from tunemill.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_redrawn() -> None:
    terminal = Terminal()
    with Progress(terminal).task("push", total=4_000_000, unit="B") as task:
        task.advance(4_000_000)
    assert terminal.getvalue().startswith("\r")
    assert terminal.getvalue().count("\n") == 1
    assert "push 4 MB/4 MB" in terminal.getvalue()


def test_a_pipe_gets_log_lines_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    pipe = io.StringIO()
    with caplog.at_level(logging.INFO), Progress(pipe).task("train", total=100, unit="steps") as task:
        for _ in range(100):
            task.advance(1, note="loss 1.5")
    assert pipe.getvalue() == ""
    assert 2 < len(caplog.messages) < 101
    assert "loss 1.5" in caplog.messages[-1]
    assert caplog.messages[-1].startswith("train 100/100 steps")


def test_short_tasks_leave_no_line_in_a_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Progress(io.StringIO()).task("hash") as task:
        task.advance()
    assert caplog.messages == []


def test_the_last_line_is_not_repeated_and_a_start_foretells_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with caplog.at_level(logging.INFO), Progress(io.StringIO()).task("fit", total=1000) as task:
        task.advance(1)
        task.advance(499)
        task.advance(500)
    assert len(caplog.messages) == 3
    assert "left" not in caplog.messages[0]
    assert "left" in caplog.messages[1]


def test_what_an_earlier_run_did_is_no_part_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    now = 0.0
    with Progress(io.StringIO(), quiet=True).task("infer", total=100, unit="rows") as task:
        task.skip(60)
        assert task.line() == "infer 60/100 rows"
        task.advance(10)
        now = 5.0
        assert task.line() == "infer 70/100 rows, 2/s, 15 s left"

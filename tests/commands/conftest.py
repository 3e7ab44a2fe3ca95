"""What the tests of this folder share: the backends, and the command line within this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from backends import make_draft, moto, moto_endpoint
from tunemill import cli

__all__ = ["make_draft", "moto", "moto_endpoint"]


@pytest.fixture
def command_line(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``command_line(*words)`` returns code, stdout and stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        cli._talk_on_stderr()
        code = cli.run(list(words))
        return code, *capfd.readouterr()

    return call

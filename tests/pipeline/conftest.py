"""Running the command line as a user does, with a store and a cache of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def tunemill(work: Path) -> Run:
    """``tunemill(*arguments)`` in an empty directory, which must succeed unless ``check`` is False."""

    def run(*arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "tunemill.cli", *arguments],
            cwd=work,
            env={**os.environ, "TUNEMILL_CACHE": str(work / "cache"), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, f"{arguments}: {done.stderr[-3000:]}"
        return done

    return run

"""SIGKILL at more than sixty points of a publish and of a pull, on every backend.

Never is a partial artifact visible, every rerun completes, and at most one part per worker travels twice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from backends import SMALL_PART
from tunemill.store.backend import Backend

CHILD = Path(__file__).with_name("killed.py")
EVENTS, MOMENTS = 60, 8
SMALLEST_PART = 5 << 20  # bytes, on S3
WORKERS = 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["publish", "pull"])
def test_a_kill_at_any_moment_leaves_nothing_half_visible(
    kind: str, backend: Backend, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = backend.url.removeprefix("file://")
    part = SMALLEST_PART if "real" in request.node.callspec.id else SMALL_PART
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, str(CHILD), kind, url, str(work), str(part), str(EVENTS), str(MOMENTS)]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert ended.returncode == 0, ended.stderr
    facts = json.loads(ended.stdout)
    assert facts["events"] >= EVENTS, "points would fall together"
    assert facts["points"] == EVENTS + MOMENTS
    assert facts["killed"] >= 60, "a child outran its kill too often"
    assert facts["most_resent"] <= WORKERS

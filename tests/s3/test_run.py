"""The real S3 server comes up fresh, and goes with the process that wanted it, however that ends."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = Path(os.environ.get("TUNEMILL_RGW_ROOT", "/var/lib/tunemill-rgw"))
PROGRAM = "import os, time; print(os.environ['TUNEMILL_TEST_S3'], flush=True); time.sleep(60)"


def run(*command: str) -> subprocess.Popen[str]:
    runner = [sys.executable, str(HERE / "run.py"), *command]
    return subprocess.Popen(runner, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def ends(port: int, seconds: float = 20.0) -> bool:
    """Whether the server stops listening soon."""
    limit = time.monotonic() + seconds
    while answers(port):
        if time.monotonic() > limit:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_wrong_usage_is_one_line():
    done = subprocess.run(
        ["bash", str(HERE / "ceph_rgw.sh"), "dance"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 78
    assert done.stderr == "ceph_rgw.sh: usage: ceph_rgw.sh install | serve PORT | wipe PORT\n"


@pytest.mark.s3
@pytest.mark.skipif(not ROOT.exists(), reason=f"no server of the project's own in {ROOT}")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_server_ends_with_its_runner(number):
    process = run(sys.executable, "-c", PROGRAM)
    assert process.stdout
    port = int(process.stdout.readline().rpartition(":")[2])
    assert answers(port)
    process.send_signal(number)
    code = process.wait(60)
    process.stdout.close()
    assert ends(port)
    if number == signal.SIGTERM:
        assert code == 128 + signal.SIGTERM
        assert not (ROOT / "srv" / str(port)).exists()
    else:  # its data are left, and wiped by the next server on that port
        shutil.rmtree(ROOT / "srv" / str(port), ignore_errors=True)


@pytest.mark.s3
@pytest.mark.skipif(not ROOT.exists(), reason=f"no server of the project's own in {ROOT}")
def test_exit_code_is_the_commands():
    process = run(sys.executable, "-c", "raise SystemExit(3)")
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 3, errors

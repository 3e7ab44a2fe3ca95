"""SIGTERM and Ctrl-C, sent to real processes that run real stages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tunemill.store import Store, open_store

TOYS = Path(__file__).with_name("toys.py")
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "oak.yaml").write_text("seed: 3\n")
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """``start(stage, "key=value", …)`` runs one toy stage in its own process."""
    running: list[subprocess.Popen[str]] = []

    def begin(stage: str, *settings: str) -> subprocess.Popen[str]:
        flags = [word for setting in settings for word in ("--set", setting)]
        process = subprocess.Popen(
            [sys.executable, TOYS, stage, "--model", "oak.yaml", "--run", "oak-forest", *flags],
            cwd=folder,
            env={**os.environ, "TUNEMILL_CACHE": str(folder / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


def wait_for(folder: Path, name: str) -> None:
    """Wait until a stage at work has written a file of this name."""
    deadline = time.monotonic() + 60
    while not list(folder.glob(f"cache/work/**/{name}")):
        assert time.monotonic() < deadline, f"no {name} appeared"
        time.sleep(0.02)


def store_of(folder: Path) -> Store:
    return open_store(str(folder / ".tunemill" / "store"))


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        pytest.param(signal.SIGTERM, 143, "SIGTERM", id="SIGTERM"),
        pytest.param(signal.SIGINT, 130, "interrupted", id="Ctrl-C"),
    ],
)
def test_a_signal_ends_the_work_with_its_code_and_one_line(
    start: Start, folder: Path, number: int, code: int, word: str
) -> None:
    assert finish(start("plant"))[0] == 0
    process = start("grow", "seconds=60")
    wait_for(folder, "begun")
    process.send_signal(number)
    returned, stdout, stderr = finish(process)
    assert returned == code
    assert stdout == ""
    assert word in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert store_of(folder).names() == ["base/oak"]
    assert not list(folder.glob("cache/work/*/output"))
    assert list(folder.glob("cache/work/*/scratch/begun"))


def test_a_stage_that_stops_itself_saves_and_goes_on(start: Start, folder: Path) -> None:
    assert finish(start("plant"))[0] == 0
    process = start("save", "seconds=0.3", "steps=6")
    wait_for(folder, "step.txt")
    process.terminate()
    returned, _, stderr = finish(process)
    assert returned == 143
    assert "saving before stopping" in stderr
    assert store_of(folder).find("oak-forest/adapter") is None
    returned, stdout, stderr = finish(start("save", "seconds=0.3", "steps=6"))
    assert returned == 0, stderr
    assert "going on from step" in stderr
    made = store_of(folder).resolve(stdout.splitlines()[-1])
    assert made.facts["resumed_from"] >= 1
    assert not list(folder.glob("cache/work/*/"))


def test_a_second_signal_does_not_wait_for_the_saving(start: Start, folder: Path) -> None:
    assert finish(start("plant"))[0] == 0
    process = start("save", "seconds=30", "steps=2")
    wait_for(folder, "scratch")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130


def test_work_that_is_deep_in_c_code_is_ended_after_a_grace(tmp_path: Path) -> None:
    """``time.sleep`` cannot stand for it: Python wakes from that. Here a C call holds the main thread."""
    blocked = (
        "import hashlib\n"
        "from tunemill import signals\n"
        "signals.GRACE_SECONDS = 0.5\n"
        "with signals.handled():\n"
        "    print('begun', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'a', b'b', 50_000_000)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", blocked], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.2)
    started = time.monotonic()
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert time.monotonic() - started < 10
    assert stderr.count("\n") == 1


def test_a_worker_that_is_terminated_does_not_end_its_parent() -> None:
    program = (
        "import os, signal, sys, time\n"
        "from tunemill import signals\n"
        "signals.GRACE_SECONDS = 0.5\n"
        "with signals.handled():\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        time.sleep(60)\n"
        "    time.sleep(0.3)\n"
        "    os.kill(child, signal.SIGTERM)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "    time.sleep(1.5)\n"
        "    print('alive')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{-signal.SIGTERM}\nalive\n"), done.stderr


def test_a_sigkill_leaves_nothing_visible_and_the_rerun_completes(start: Start, folder: Path) -> None:
    assert finish(start("plant"))[0] == 0
    process = start("grow", "seconds=1")
    wait_for(folder, "begun")
    process.kill()
    process.communicate()
    assert store_of(folder).names() == ["base/oak"]
    returned, stdout, stderr = finish(start("grow", "seconds=1"))
    assert returned == 0, stderr
    paths = {file.path for file in store_of(folder).resolve(stdout.splitlines()[-1]).files}
    assert paths == {"whole.txt", "plant.txt"}


def test_a_second_process_waits_for_the_first(start: Start, folder: Path) -> None:
    assert finish(start("plant"))[0] == 0
    first = start("grow", "seconds=1")
    wait_for(folder, "begun")
    first.send_signal(signal.SIGSTOP)  # so that the second finds it at work, however slow the machine is
    second = start("grow", "seconds=1")
    assert second.stderr is not None
    assert "waiting for it" in second.stderr.readline()
    first.send_signal(signal.SIGCONT)
    results = [finish(first), finish(second)]
    assert [result[0] for result in results] == [0, 0]
    assert results[0][1] == results[1][1]
    assert "reusing" in results[1][2]

"""Foreign code in a child: its bounds, its end, and the line that says why."""

import os
import subprocess
import sys
import threading
import time

import pytest

from tunemill.errors import BadDataError, ConfigurationError, Stopped, TransientError
from tunemill.gguf.child import Ended, Limits, fail, run

GENEROUS = Limits(60, 8 << 30)


@pytest.fixture
def script(tmp_path):
    def write(text: str) -> list[str]:
        path = tmp_path / "script.py"
        path.write_text(text)
        return [str(path)]

    return write


def test_output_and_status_come_back(script, tmp_path):
    ended = run(
        script("import sys; print('hello'); sys.exit(3)"), tmp_path / "s", GENEROUS, threading.Event()
    )
    assert (ended.code, ended.log) == (3, "hello\n")


def test_a_script_finds_its_own_modules_and_none_of_the_users(script, tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("name = 'mine'")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    text = "import beside, os, sys; print(beside.name, sys.path[0], '/nowhere' in sys.path, dict(os.environ))"
    log = run(script(text), tmp_path / "s", GENEROUS, threading.Event()).log
    assert log.startswith(f"mine {tmp_path} False")
    assert "secret" not in log
    assert "proxy" not in log.lower()


@pytest.mark.skipif(sys.platform != "linux", reason="macOS enforces no memory limit")
def test_memory_is_bounded(script, tmp_path):
    limits = Limits(60, 200 << 20)
    ended = run(script("x = bytearray(400 << 20)"), tmp_path / "s", limits, threading.Event())
    with pytest.raises(ConfigurationError, match=r"more than 0\.2 GB"):
        fail(ended, "it", limits)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().split()[2] != "Z"


GRANDCHILD = (
    "import subprocess, sys, time;"
    "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    "print(p.pid, flush=True); time.sleep(60)"
)


@pytest.mark.parametrize("how", ["time", "stop"])
def test_the_whole_group_ends(script, tmp_path, how):
    stop = threading.Event()
    if how == "stop":
        threading.Timer(1.5, stop.set).start()
    limits = Limits(1.5 if how == "time" else 60, 8 << 30)
    with pytest.raises(TransientError if how == "time" else Stopped):
        run(script(GRANDCHILD), tmp_path / "s", limits, stop)
    pid = int((tmp_path / "s" / "log").read_text())
    time.sleep(0.2)
    assert not alive(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_the_child_dies_with_us(script, tmp_path):
    command = script("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    parent = (
        "import sys, threading; from pathlib import Path; from tunemill.gguf.child import Limits, run;"
        f"run({command!r}, Path({str(tmp_path / 's')!r}), Limits(60, 8 << 30), threading.Event())"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    log = tmp_path / "s" / "log"
    while not (log.exists() and log.read_text().endswith("\n")):
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(0.3)
    assert not alive(int(log.read_text()))


@pytest.mark.parametrize(
    ("ended", "error", "line"),
    [
        pytest.param(
            Ended(1, "INFO: x\nTraceback\n  File\nKeyError: 'rope'\n"),
            BadDataError,
            "it: KeyError: 'rope'",
            id="exception",
        ),
        pytest.param(
            Ended(1, "INFO: x\nERROR:hf: Model X is not supported\nbye\n"),
            BadDataError,
            "it: ERROR:hf: Model X is not supported",
            id="logged",
        ),
        pytest.param(
            Ended(-6, "GGML_ASSERT(n > 0) failed\n"),
            BadDataError,
            "it: GGML_ASSERT(n > 0) failed (ended by SIGABRT)",
            id="abort",
        ),
        pytest.param(
            Ended(1, "OSError: [Errno 28] No space left on device\n"),
            TransientError,
            "no space left",
            id="full",
        ),
        pytest.param(Ended(-9, "..."), TransientError, "memory runs out", id="killed"),
        *(
            pytest.param(
                Ended(code, said), ConfigurationError, "needs more than 8.6 GB of memory", id=said[:20]
            )
            for code, said in (
                (1, "MemoryError\n"),
                (-6, "terminate called after throwing an instance of 'std::bad_alloc'\n"),
                (
                    1,
                    "RuntimeError: DefaultCPUAllocator: can't allocate memory\n",
                ),
                (127, "cannot allocate memory for thread-local data: ABORT\n"),
                (1, "OSError: [Errno 12] Cannot allocate memory\n"),
            )
        ),
        pytest.param(
            Ended(1, "ModuleNotFoundError: No module named 'x'\n"),
            ConfigurationError,
            "pip install",
            id="module",
        ),
        pytest.param(Ended(1, ""), BadDataError, "it said nothing", id="silent"),
    ],
)
def test_why_it_failed(ended, error, line):
    with pytest.raises(error) as caught:
        fail(ended, "it", GENEROUS)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_success_raises_nothing():
    fail(Ended(0, "Error: none"), "it", GENEROUS)

"""Run a command beside a fresh, real S3 server, and leave nothing of the server behind.

    python tests/s3/run.py [COMMAND ...]        the default command is: pytest -m s3 tests

Installs Ceph RGW first when it is absent (``ceph_rgw.sh``). The command finds the server in
TUNEMILL_TEST_S3 and its keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. The exit code is
the command's, or 78 when no server could be had. The server dies with this process, by its
own end or by any signal.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SERVER = Path(__file__).with_name("ceph_rgw.sh")
ROOT = Path(os.environ.get("TUNEMILL_RGW_ROOT", "/var/lib/tunemill-rgw"))
FIRST_PORT = int(os.environ.get("TUNEMILL_RGW_PORT", "7490"))
PORTS_EACH = 100  # one server takes its port and up to 90 above it
READY_SECONDS = 120.0  # 5 s on an idle machine; a loaded one has been seen to need 30
WIPE_TRIES = 20
UNFIT = 78


class NoServer(Exception):
    """No server could be had; the message says why."""


def main(arguments: Sequence[str]) -> int:
    """Serve, run the command, clean up; return the command's exit code."""
    command = list(arguments) or [sys.executable, "-m", "pytest", "-m", "s3", "tests"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        install()
        with server() as environment:
            return subprocess.run(command, env=environment, check=False).returncode
    except NoServer as error:
        print(f"run.py: {error}", file=sys.stderr)
        return UNFIT


def install() -> None:
    """Install the server when it is absent."""
    if ROOT.exists():
        return
    say("installing Ceph RGW from Debian packages; once, takes a minute or more")
    if subprocess.run([SERVER, "install"], stdout=sys.stderr, check=False).returncode:
        raise NoServer("Ceph RGW could not be installed")


@contextmanager
def server() -> Iterator[dict[str, str]]:
    """A fresh server while the block runs; yields the environment to reach it."""
    port = free_port()
    environment = os.environ | {
        "TUNEMILL_TEST_S3": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": secrets.token_hex(10),
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        environment.pop(name, None)  # the user's own account must not get mixed in
    wipe(port)
    process = subprocess.Popen([SERVER, "serve", str(port)], env=environment, start_new_session=True)
    try:
        say(f"server ready at {environment['TUNEMILL_TEST_S3']} after {wait_ready(process, port):.1f} s")
        yield environment
    finally:
        process.kill()
        process.wait()
        wipe(port)


def free_port() -> int:
    """First port of a block in which S3 and the monitor can listen."""
    for port in range(FIRST_PORT, FIRST_PORT + 10 * PORTS_EACH, PORTS_EACH):
        if not any(listens(port + offset) for offset in (0, 1, 10)):
            return port
    raise NoServer(f"every port tried from {FIRST_PORT} on is in use: set TUNEMILL_RGW_PORT")


def listens(port: int) -> bool:
    """Whether something accepts connections on this port of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_ready(process: subprocess.Popen[bytes], port: int) -> float:
    """Wait until S3 answers; return how many seconds it took."""
    started = time.monotonic()
    while time.monotonic() - started < READY_SECONDS:
        if process.poll() is not None:
            raise NoServer(f"the server ended with code {process.returncode}: {last_line(port)}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
            return time.monotonic() - started
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise NoServer(f"the server did not answer within {READY_SECONDS:.0f} s: {last_line(port)}")


def last_line(port: int) -> str:
    """What the server wrote last, to be put into a message."""
    output = ROOT / "srv" / str(port) / "out.log"
    lines = output.read_text(errors="replace").splitlines() if output.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "it wrote nothing")


def wipe(port: int) -> None:
    """Delete what a server on this port stored; killed daemons may write for a moment yet."""
    for _ in range(WIPE_TRIES):
        if not subprocess.run([SERVER, "wipe", str(port)], check=False).returncode:
            return
        time.sleep(0.5)
    raise NoServer(f"could not delete {ROOT}/srv/{port}")


def say(message: str) -> None:
    """Tell the user; stdout belongs to the command."""
    print(f"run.py: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)

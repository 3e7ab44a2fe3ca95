"""Run a command beside a Docker engine that can build and run the project's images.

    python tests/images/run.py [COMMAND ...]        the default command is: pytest -m docker tests

Takes the machine's own engine where it has buildx and Compose v2; else, as root on Debian, unpacks one
under TUNEMILL_DOCKER_ROOT (``engine.sh``), runs it while the command runs, and keeps what it has built for
the next time. The exit code is the command's, or 78 when no engine could be had.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

OWN = Path(__file__).with_name("engine.sh")
OLDEST_ENGINE = 23  # the first whose BuildKit knows named build contexts
READY_SECONDS = 60.0
KEPT = "10GB"  # one run leaves less than this
UNFIT = 78


class NoEngine(Exception):
    """There is no engine and none can be had."""


def main(arguments: Sequence[str]) -> int:
    """Find or start an engine, run the command, stop what was started; return the command's exit code."""
    command = list(arguments) or [sys.executable, "-m", "pytest", "-m", "docker", "tests"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # Ignored, as behind a shell's "&" or nohup, they would be ignored by every process of the tests, which
    # send them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(128 + signal.SIGHUP))
    try:
        with engine() as environment:
            return subprocess.run(command, env=environment, check=False).returncode
    except NoEngine as error:
        print(f"run.py: {error}", file=sys.stderr)
        return UNFIT


@contextmanager
def engine() -> Iterator[Mapping[str, str]]:
    """Yield the environment that reaches a fit engine."""
    lacking = what_lacks(os.environ)
    if not lacking:
        yield os.environ
        return
    say(f"the machine's own Docker does not do ({lacking}): one from Debian's packages is started")
    if subprocess.run([OWN, "install"], stdout=sys.stderr, check=False).returncode:
        raise NoEngine(f"no fit Docker engine here ({lacking}), and none could be unpacked")
    environment = own_environment()
    if not what_lacks(environment):  # another run's
        yield environment
        return
    process = subprocess.Popen([OWN, "serve"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(process, environment)
        yield environment
    finally:
        tidy(environment)
        process.terminate()
        process.wait()


def what_lacks(environment: Mapping[str, str]) -> str:
    """Return what keeps an engine from building the images, or nothing."""
    if shutil.which("docker", path=environment["PATH"]) is None:
        return "no docker client"
    version = said(environment, "docker", "version", "--format", "{{json .Server.Version}}")
    if version is None:
        return "no engine answers"
    if int(json.loads(version).partition(".")[0]) < OLDEST_ENGINE:
        return f"engine {json.loads(version)} is older than {OLDEST_ENGINE}"
    for plugin in ("buildx", "compose"):
        if said(environment, "docker", plugin, "version") is None:
            return f"docker has no {plugin}"
    return ""


def own_environment() -> dict[str, str]:
    """The environment of a client of the unpacked engine."""
    script = f'eval "$("{OWN}" env)" && env -0'
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
    return dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)


def wait_until_ready(process: subprocess.Popen[bytes], environment: Mapping[str, str]) -> None:
    """Return when the engine answers."""
    started = time.monotonic()
    while lacking := what_lacks(environment):
        if process.poll() is not None:
            raise NoEngine(f"the engine ended with code {process.returncode}; '{OWN} serve' shows why")
        if time.monotonic() - started > READY_SECONDS:
            raise NoEngine(f"the engine is not fit after {READY_SECONDS:.0f} s: {lacking}")
        time.sleep(0.2)


def tidy(environment: Mapping[str, str]) -> None:
    """Keep what the next run can use and no more.

    Every change of a lock would leave gigabytes, and a run that was killed its containers and volumes.
    """
    containers = (said(environment, "docker", "ps", "--all", "--quiet") or "").split()
    for command in (
        ("rm", "--force", *containers),
        ("volume", "prune", "--all", "--force"),
        ("network", "prune", "--force"),
        ("image", "prune", "--force"),
        ("builder", "prune", "--force", "--keep-storage", KEPT),
    ):
        said(environment, "docker", *command)


def said(environment: Mapping[str, str], *command: str) -> str | None:
    """What a command prints, or None when it fails."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def say(message: str) -> None:
    """Tell the user; stdout belongs to the command."""
    print(f"run.py: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)

"""Renders chat templates in a child process, so that none can take more than its share.

A template is a program from a stranger. Jinja's sandbox keeps it from files and from Python's own
objects, but not from looping for ever or from a list that holds itself a trillion times over, and
neither can be stopped from inside a process: one operation in C may take all memory. So the child
has a bound on processor time for each text, on memory, and on the text; a template that meets one
is not tried again. The child costs a tenth of a second once, and some 0.1 ms for each text, less for
many at once.

Run as ``python -m tunemill.rendering``: a line of JSON in, a line of JSON out.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NoReturn

from tunemill.errors import BadDataError

SECONDS = 1  # of processor time; a real template takes less than a millisecond
MEMORY = 1 << 29  # address space of the child; Python and Jinja take about 100 MB of it
AT_ONCE = 1 << 20  # bytes sent to the child together: sending each text alone costs more than rendering it
MAX_TEXT = 1 << 24  # characters; the longest contexts are a few million tokens
INHERITED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")
"""What a child that reads a stranger's files sees of the environment: enough to find its modules."""
DATE = datetime(2024, 7, 26, tzinfo=UTC)
"""The day that templates are told it is (Llama 3.2's own default): a prompt that changes with
the calendar could not be reproduced."""


class Renderer:
    """One child process, started when first needed and again after it had to be ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._refused: dict[str, str] = {}

    def render(self, template: str, variables: Sequence[dict[str, Any]]) -> list[str | BadDataError]:
        """Return what a template makes of each of the variables, which have to be plain JSON values.

        For those that it refuses there is the error instead of a text.

        Raises:
            ModuleNotFoundError: Jinja is not installed.
        """
        texts: list[str | BadDataError] = []
        for portion in _portions([json.dumps(each) for each in variables]):
            with self._lock:
                texts += self._some(template, portion)
        return texts

    def _some(self, template: str, variables: Sequence[str]) -> list[str | BadDataError]:
        if template not in self._refused:
            answers = self._ask(
                f'{{"template": {json.dumps(template)}, "variables": [{",".join(variables)}]}}'
            )
            bounds = [answer["bound"] for answer in answers if "bound" in answer]
            if not bounds:
                return [_text(answer) for answer in answers]
            self._refused[template] = f"the chat template takes more than {bounds[0]} for one text"
        return [BadDataError(self._refused[template]) for _ in variables]

    def _ask(self, request: str) -> list[dict[str, str]]:
        child = self._running()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(request.encode() + b"\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except BrokenPipeError:
            line = b""
        if line.endswith(b"\n"):
            answers: list[dict[str, str]] = json.loads(line)
            return answers
        self._child = None
        child.stdin.close()
        child.stdout.close()
        timed_out = child.wait() == -signal.SIGPROF
        return [{"bound": f"{SECONDS} s" if timed_out else f"{MEMORY >> 20} MiB of memory"}]

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            if find_spec("jinja2") is None:
                raise ModuleNotFoundError("No module named 'jinja2'", name="jinja2")
            self._child = subprocess.Popen(
                [sys.executable, "-s", "-B", "-m", "tunemill.rendering"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in INHERITED if name in os.environ},
                start_new_session=True,  # Ctrl-C is for us, who then close its stdin
            )
        return self._child


@lru_cache(maxsize=1)
def _renderer(_process: int) -> Renderer:
    return Renderer()


def render(template: str, variables: Sequence[dict[str, Any]]) -> list[str | BadDataError]:
    """Render in this process's own child; a forked process gets one of its own.

    Raises:
        ModuleNotFoundError: as ``Renderer.render``.
    """
    return _renderer(os.getpid()).render(template, variables)


def _portions(variables: Sequence[str]) -> Iterator[list[str]]:
    portion: list[str] = []
    size = 0
    for each in variables:
        portion.append(each)
        size += len(each)
        if size >= AT_ONCE:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _text(answer: dict[str, str]) -> str | BadDataError:
    if "error" in answer:
        return BadDataError(f"the chat template cannot render this conversation: {answer['error']}")
    return answer["text"]


@lru_cache(maxsize=8)
def _compile(source: str) -> Any:
    """Compile a template with the settings and functions that transformers gives it."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    def strftime_now(pattern: str) -> str:
        return DATE.strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment.from_string(source)


def _answer(template: str, variables: dict[str, Any]) -> dict[str, str]:
    try:
        text = _compile(template).render(variables)
    except MemoryError:
        return {"bound": f"{MEMORY >> 20} MiB of memory"}
    except Exception as error:  # noqa: BLE001 - whatever a stranger's program raises is its refusal
        return {"error": (str(error).strip().splitlines() or [type(error).__name__])[0][:300]}
    return {"text": text} if len(text) <= MAX_TEXT else {"bound": f"{MAX_TEXT} characters"}


def _answers(template: str, variables: list[dict[str, Any]]) -> list[dict[str, str]]:
    answers = []
    for each in variables:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        answers.append(_answer(template, each))
        signal.setitimer(signal.ITIMER_PROF, 0)
    return answers


def main() -> None:
    """Answer requests until stdin ends, each within its bounds."""
    import resource

    import jinja2.sandbox  # noqa: F401 - before the bounds, and not in the first text's time

    if sys.platform == "linux":  # macOS enforces no limit on memory
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin.buffer:
        try:
            answer = json.dumps(_answers(**json.loads(line)))
        except MemoryError:
            answer = json.dumps([{"bound": f"{MEMORY >> 20} MiB of memory"}])
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

"""A pod's log, followed to its end, each line once.

The server can go on only from a whole second, so every line is asked for with its timestamp, and what
was seen of that second is left out when a lost connection is made again.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from queue import Queue
from typing import Any

from tunemill.errors import TransientError, TunemillError
from tunemill.kube.api import Api, Cut, Json, NotFound, Refused
from tunemill.kube.render import CONTAINER
from tunemill.kube.watching import PAUSE, Failed

TRIES_AT_END = 20
STAMP = re.compile(
    r"(?P<second>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(?P<fraction>\d+))?(?P<zone>Z|[+-]\d\d:\d\d)"
)
REFERENCE = re.compile(r"[a-z0-9][a-z0-9._/-]*@sha256:[0-9a-f]{64}")
"""The last line of a stage's stdout."""


@dataclass(frozen=True)
class Line:
    """One line that a pod wrote."""

    pod: str
    text: str


@dataclass(frozen=True)
class Ended:
    """A pod's log has been read to its end."""

    pod: str


class Place:
    """Where in a log reading has got to."""

    def __init__(self) -> None:
        self._at = ("", "")
        """Second in UTC, and its fraction, of the last line."""
        self._seen = 0
        """Lines of exactly that moment."""
        self._skip = 0
        self._known = False
        """What comes may have been there before."""

    def resume(self) -> dict[str, str]:
        """Return the query that goes on from here; its first lines may be known."""
        self._skip, self._known = self._seen, bool(self._at[0])
        return {"sinceTime": f"{self._at[0]}Z"} if self._known else {}

    def take(self, raw: str) -> str | None:
        """Return the text of a raw line, or None when it was there before."""
        stamp, _, text = raw.partition(" ")
        at = _moment(stamp)
        if at is None:
            return raw
        if self._known and at < self._at:
            return None
        if self._known and at == self._at and self._skip:
            self._skip -= 1
            return None
        self._known = False
        self._seen = self._seen + 1 if at == self._at else 1
        self._at = at
        return text


class PodLog(threading.Thread):
    """Reads one pod's log into a queue until its container has ended."""

    def __init__(self, api: Api, pod: Json, found: Queue[Any]) -> None:
        super().__init__(name="log", daemon=True)
        self._api, self._found = api, found
        self._name: str = pod["metadata"]["name"]
        self._path = f"{api.pods}/{self._name}"
        self._place = Place()

    def run(self) -> None:
        """Read to the end."""
        try:
            for text in self._follow():
                self._found.put(Line(self._name, text))
        except TunemillError as error:
            self._found.put(Failed("log", error))
        self._found.put(Ended(self._name))

    def _follow(self) -> Iterator[str]:
        over, tries = False, 0
        while not over or tries < TRIES_AT_END:
            try:
                over = self._is_over()  # asked before reading: what follows is then the whole rest
                yield from self._read(follow=not over)
                if over:
                    return
            except NotFound:
                return
            except Refused:  # 400 while the container is being made
                if over:
                    return
            except (Cut, TransientError) as error:
                tries += over
                if isinstance(error, TransientError):
                    self._found.put(Failed("log", error))
            time.sleep(PAUSE)
        raise TransientError(
            f"the rest of the log of {self._name} cannot be read: its connection is lost each time"
        )

    def _read(self, follow: bool) -> Iterator[str]:
        query = {"container": CONTAINER, "timestamps": "true", **self._place.resume()}
        with self._api.lines(f"{self._path}/log", query | ({"follow": "true"} if follow else {})) as lines:
            for raw in lines:
                text = self._place.take(raw)
                if text is not None:
                    yield text

    def _is_over(self) -> bool:
        try:
            return started(self._api.get(self._path)) == "ended"
        except NotFound:
            return True


def started(pod: Json) -> str:
    """Say how far the stage's container is: waiting, running or ended."""
    state = stage_state(pod)
    if "terminated" in state or pod.get("status", {}).get("phase") in ("Succeeded", "Failed"):
        return "ended"
    return "running" if "running" in state else "waiting"


def stage_state(pod: Json) -> Json:
    """Return the state of the container that runs the stage."""
    for status in pod.get("status", {}).get("containerStatuses") or []:
        if status["name"] == CONTAINER:
            state: Json = status.get("state") or {}
            return state
    return {}


def _moment(stamp: str) -> tuple[str, str] | None:
    """Return second (UTC) and fraction of an RFC 3339 stamp, which orders them; nodes have time zones."""
    found = STAMP.fullmatch(stamp)
    if found is None:
        return None
    second = datetime.fromisoformat(found["second"] + found["zone"].replace("Z", "+00:00")).astimezone(UTC)
    return f"{second:%Y-%m-%dT%H:%M:%S}", (found["fraction"] or "").rstrip("0")

"""One kind of object, kept current: list, watch from there, list again when the server has forgotten.

A watch loses nothing: cut off, it goes on from the last resource version it saw; too old for the server
(410), it lists again and reports what vanished meanwhile. Each runs in a thread of its own and puts what
it sees into a queue.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import dataclass
from queue import Queue
from typing import Any

from tunemill.errors import TunemillError
from tunemill.kube.api import STREAM_SECONDS, Api, Cut, Expired, Json, refusal

PAUSE = 1.0  # seconds before a lost connection is made again, so that a server that cuts all is not flooded
PAGE = "500"

log = logging.getLogger("tunemill")


@dataclass(frozen=True)
class Change:
    """An object as it is now."""

    kind: str
    thing: Json
    gone: bool = False


@dataclass(frozen=True)
class Failed:
    """A watch or a log that ended for good."""

    kind: str
    error: TunemillError


class Watch(threading.Thread):
    """Watches the objects of a path that a selector chooses."""

    def __init__(self, api: Api, kind: str, path: str, selector: dict[str, str], found: Queue[Any]) -> None:
        super().__init__(name=f"watch {kind}", daemon=True)
        self._api, self._kind, self._path, self._selector, self._found = api, kind, path, selector, found
        self._known: dict[str, Json] = {}
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let it end with its next line or its next reconnect."""
        self._stopped.set()

    def run(self) -> None:
        """Watch until stopped."""
        while not self._stopped.is_set():
            try:
                self._watch(self._list())
            except Expired:
                log.debug("watch of %s expired, listing again", self._kind)
            except TunemillError as error:
                self._found.put(Failed(self._kind, error))
                return

    def _list(self) -> str:
        listed: dict[str, Json] = {}
        more = {"limit": PAGE}
        while True:
            page = self._api.get(self._path, **self._selector, **more)
            listed |= {thing["metadata"]["uid"]: thing for thing in page["items"]}
            if not page["metadata"].get("continue"):
                break
            more = {"limit": PAGE, "continue": page["metadata"]["continue"]}
        for uid in set(self._known) - set(listed):
            self._tell(self._known[uid], gone=True)
        for uid, thing in listed.items():
            before = self._known.get(uid)
            if (
                before is None
                or before["metadata"]["resourceVersion"] != thing["metadata"]["resourceVersion"]
            ):
                self._tell(thing, gone=False)
        return str(page["metadata"]["resourceVersion"])

    def _watch(self, version: str) -> None:
        while not self._stopped.is_set():
            query = {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(STREAM_SECONDS)}
            started = time.monotonic()
            try:
                with self._api.lines(
                    self._path, {**self._selector, **query, "resourceVersion": version}
                ) as lines:
                    for line in lines:
                        version = self._take(json.loads(line))
                        if self._stopped.is_set():
                            return
            except (Cut, json.JSONDecodeError):
                log.debug("watch of %s was cut, going on from %s", self._kind, version)
            if time.monotonic() - started < PAUSE:
                self._stopped.wait(PAUSE)

    def _take(self, event: Json) -> str:
        thing: Json = event["object"]
        if event["type"] == "ERROR":
            error = refusal(int(thing.get("code", 500)), thing, self._api.where)
            raise (
                error if isinstance(error, Expired) else Expired(str(error))
            )  # anything else: from the start too
        if event["type"] != "BOOKMARK":
            self._tell(thing, gone=event["type"] == "DELETED")
        return str(thing["metadata"]["resourceVersion"])

    def _tell(self, thing: Json, gone: bool) -> None:
        uid = thing["metadata"]["uid"]
        if gone:
            self._known.pop(uid, None)
        else:
            self._known[uid] = thing
        self._found.put(Change(self._kind, thing, gone))

"""Waits for a server that is only starting, or being started again.

boto3 gives a request up within a second when nothing listens, which is right for a lost packet and
too soon for a restart. So requests that never reached a server are sent again for a minute, counted
for all of a backend's threads together; then the usual error follows.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from tunemill.signals import stopping
from tunemill.store.s3_errors import NOBODY_THERE, nobody

WAIT_SECONDS = 60.0  # a Ceph RGW starts in 5 s; on a loaded machine it has been seen to need 30
PAUSE_SECONDS = 1.0

log = logging.getLogger("tunemill")


class Patience:
    """A listener of boto3's ``needs-retry``, which decides before boto3's own does."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._since: float | None = None
        """When the outage under way began."""
        self._last = 0.0

    def __call__(self, caught_exception: Any = None, response: Any = None, **_: Any) -> float | None:
        """Return the seconds until the request is sent again; None leaves the decision to boto3."""
        with self._lock:
            if isinstance(caught_exception, NOBODY_THERE):
                return self._absent(caught_exception)
            if response is not None and self._since is not None:
                self._since = None
                log.info("%s: the server answers again", self._url)
        return None

    def _absent(self, error: Any) -> float | None:
        now = time.monotonic()
        if self._since is None or now - self._last > WAIT_SECONDS:
            self._since = now
            log.warning("%s: %s; trying for %.0f s", self._url, nobody(error), WAIT_SECONDS)
        self._last = now
        patient = now - self._since < WAIT_SECONDS and not stopping()
        return PAUSE_SECONDS if patient else None

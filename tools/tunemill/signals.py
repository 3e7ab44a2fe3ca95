"""SIGTERM and Ctrl-C: everything ends soon, in order, with the documented exit code.

A signal raises ``SignalReceived`` in the main thread, so that ``finally`` blocks run and no ``except
Exception`` of a library swallows it. A stage that saves its own state is only told to stop; a second
signal raises all the same. Work that is deep in C code, where Python cannot raise, is ended after a
grace: the store's promises hold at any kill, so this is safe too.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tunemill.errors import Interrupted, Stopped, TunemillError

GRACE_SECONDS = 5.0  # Kubernetes kills after 30 by default; most C calls return sooner than this
HANDLED = (signal.SIGTERM, signal.SIGINT)

log = logging.getLogger("tunemill")


class SignalReceived(BaseException):
    """A signal arrived; no ``Exception``, so that only the harness catches it."""


class Signals:
    """Which signal arrived, and who has to react to it."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        """Set by the first signal."""
        self.received: int | None = None
        self._noticed = threading.Event()
        self._saving = False

    @contextmanager
    def saved_by_work(self) -> Iterator[None]:
        """Within the block the first signal only sets ``stop``: the work saves and ends by itself."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def error(self) -> TunemillError:
        """Return the error whose exit code tells which signal it was."""
        if self.received == signal.SIGINT:
            return Interrupted("interrupted; run the same command again to go on")
        return Stopped("stopped by SIGTERM; run the same command again to go on")

    def raise_if_received(self) -> None:
        """End here when a signal arrived earlier.

        Raises:
            SignalReceived: one did.
        """
        if self.received is not None:
            raise SignalReceived

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        first = self.received is None
        self.received = number
        self._noticed.set()
        self.stop.set()
        if first and self._saving:
            log.warning("saving before stopping; the same signal again stops at once")
            return
        raise SignalReceived

    def _watch(self, arrivals: socket.socket) -> None:
        """End the process when a signal arrived and the main thread cannot notice."""
        while data := arrivals.recv(1):
            if data[0] in HANDLED and not self._noticed.wait(GRACE_SECONDS) and not self._saving:
                log.error(
                    "tunemill: stopped in the middle of a long computation; nothing half-done is visible"
                )
                os._exit(128 + data[0])


@contextmanager
def handled() -> Iterator[Signals]:
    """Handle signals within the block; outside the main thread nothing can be handled.

    Raises:
        Stopped: SIGTERM ended the block.
        Interrupted: Ctrl-C did.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    arrivals, wake = socket.socketpair()
    wake.setblocking(False)
    previous = {number: signal.signal(number, signals._handle) for number in HANDLED}
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=signals._watch, args=(arrivals,), name="signals", daemon=True).start()
    try:
        yield signals
    except (SignalReceived, Stopped):
        raise signals.error() from None
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in previous.items():
            signal.signal(number, handler)
        wake.close()


def stopping() -> bool:
    """Say whether a signal arrived that ends this process; for waits in other threads than the main one."""
    signals = _handling()
    return signals is not None and signals.stop.is_set()


def _handling() -> Signals | None:
    handler = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return handler if isinstance(handler, Signals) else None


def _forget_in_child() -> None:
    """Give a forked worker the usual signals: its SIGTERM is not ours, and it shares our socket."""
    if _handling() is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


os.register_at_fork(after_in_child=_forget_in_child)

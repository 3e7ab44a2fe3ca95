"""Engines side by side over one model, so that small models use every core.

llama.cpp's threads wait for each other at every operation. A model of a few million parameters has
operations so short that this waiting costs more than it gains, above all on a busy machine: measured
on two busy cores, two threads in one context were 3 to 8 times slower than one. So a small model
gets one single-threaded context per core, a large one (whose contexts cost memory) one context with
all threads. Results do not depend on it: each task starts from the same remembered beginning.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from types import TracebackType
from typing import Self, TypeVar

from tunemill.errors import Stopped
from tunemill.infer.engine import CELL_STEP, Engine, Size
from tunemill.infer.model import Model

SMALL = 256 << 20  # bytes of weights up to which a context per core is cheap
CELLS_GROW = 4 * CELL_STEP  # so that slightly longer shards seldom need new contexts

T = TypeVar("T")
R = TypeVar("R")


class Pool:
    """Engines of one size. Close it, or use it as a context manager."""

    def __init__(self, model: Model, size: Size, threads: int, stop: threading.Event) -> None:
        self._contexts, self._threads = _divide(threads or _cores(), model)
        self._model = model
        self._size = size
        self._stop = stop
        self._engines: list[Engine] = []
        self.vocabulary = model.vocabulary
        self.shared = 0
        """Tokens of the common beginning."""

    def share(self, prefix: tuple[int, ...], cells: int) -> None:
        """Start afresh: room for ``cells`` tokens in each engine, ``prefix`` as every beginning."""
        if not self._engines or cells > self._engines[0].cells:
            self.close()
            size = replace(self._size, cells=-(-cells // CELLS_GROW) * CELLS_GROW)
            for _ in range(self._contexts):
                self._engines.append(Engine(self._model, size, self._threads))
        self.shared = len(prefix)
        for engine in self._engines:
            engine.share(prefix)

    def each(self, task: Callable[[Engine, T], R], items: Sequence[T]) -> Iterator[R]:
        """Yield ``task(engine, item)`` of each item, in order.

        Raises:
            Stopped: the stop event was set; tasks under way are finished first.
        """
        free: SimpleQueue[Engine] = SimpleQueue()
        for engine in self._engines:
            free.put(engine)

        def run(item: T) -> R:
            if self._stop.is_set():
                raise Stopped("stopped; run the same command again to go on from the last saved rows")
            engine = free.get()
            try:
                return task(engine, item)
            finally:
                free.put(engine)

        with ThreadPoolExecutor(len(self._engines), thread_name_prefix="infer") as workers:
            yield from workers.map(run, items)

    def close(self) -> None:
        """Free all engines; safe to call twice."""
        while self._engines:
            self._engines.pop().close()

    def __enter__(self) -> Self:
        """Return the pool itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free all engines."""
        self.close()


def _cores() -> int:
    mine = getattr(os, "sched_getaffinity", None)  # Linux only; fewer than the machine's in a container
    return len(mine(0)) if mine else os.cpu_count() or 1


def _divide(cores: int, model: Model) -> tuple[int, int]:
    """Return how many contexts, with how many threads each."""
    if model.on_gpu or model.size > SMALL:
        return 1, cores
    return cores, 1

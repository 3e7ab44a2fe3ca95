"""The processes that run one stage together, as torchrun starts them; mostly there is one.

They start alike and learn from the environment which of them they are: 0 decides and publishes. What
one of them has to know of the others goes through a ``Group``; who is alone needs no network for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Group(Protocol):
    """Collective calls: every process of the group makes the same ones in the same order.

    Each raises ``TransientError`` when another process is gone.
    """

    @property
    def rank(self) -> int:
        """Which process this is, from 0."""

    @property
    def local_rank(self) -> int:
        """Which process of this machine this is, from 0."""

    @property
    def size(self) -> int:
        """How many processes there are."""

    def gather(self, value: Any) -> list[Any]:
        """Return what every process gave, by rank; returns once all have called."""

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the sums over the processes."""


@dataclass(frozen=True)
class Alone:
    """A group of one process."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    def gather(self, value: Any) -> list[Any]:
        """Return the one value."""
        return [value]

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the values themselves."""
        return list(values)


def share(group: Group, value: Any) -> Any:
    """Return what process 0 gave; the others' values are ignored."""
    return group.gather(value if group.rank == 0 else None)[0]


def started_by_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of a group, even of one."""
    return "LOCAL_RANK" in environment


def speaks(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process reports for its group: process 0 does."""
    return not started_by_torchrun(environment) or environment.get("RANK", "0") == "0"

"""The order of the tests, and how the processes of their run share the machine."""

from __future__ import annotations

import os

import pytest

# Several processes compute at once, and a thread of OpenMP that waits for another one spins on the core which
# that one needs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that at the end no process is left alone with one of them."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)

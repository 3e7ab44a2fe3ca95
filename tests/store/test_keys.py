"""Keys: the newest step of a branch sorts first, and what is no sequence number is named."""

from __future__ import annotations

import pytest

from tunemill.errors import BadDataError
from tunemill.store import keys


def test_a_higher_number_sorts_first() -> None:
    numbers = [1, 2, 9, 10, 255, 256, 10**9, 2**63]
    listed = sorted(keys.branch("base/tiny", number) for number in numbers)
    assert [keys.sequence(key) for key in listed] == sorted(numbers, reverse=True)


@pytest.mark.parametrize("last", ["", "x", "fff", "g" * 16, "0" * 17, "-" + "f" * 15])
def test_other_keys_are_no_steps(last: str) -> None:
    with pytest.raises(BadDataError, match="expected 16 hex digits"):
        keys.sequence(f"branches/base/tiny/{last}")

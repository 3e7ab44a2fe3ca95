"""Where a log goes on after its connection was lost."""

from __future__ import annotations

import pytest

from tunemill.kube.logs import Place

FIRST = ["2026-01-01T00:00:00.1Z a", "2026-01-01T00:00:00.5Z b", "2026-01-01T00:00:00.500000000Z c"]


def read(place: Place, lines: list[str]) -> list[str]:
    return [text for line in lines if (text := place.take(line)) is not None]


def test_what_was_seen_of_a_second_is_left_out() -> None:
    place = Place()
    assert place.resume() == {}
    assert read(place, FIRST) == ["a", "b", "c"]
    assert place.resume() == {"sinceTime": "2026-01-01T00:00:00Z"}
    more = ["2026-01-01T00:00:00.5Z d", "2026-01-01T00:00:01Z e"]
    assert read(place, FIRST + more) == ["d", "e"]


def test_a_clock_that_is_set_back_loses_no_line() -> None:
    place = Place()
    assert read(place, ["2026-01-01T00:00:05Z a", "2026-01-01T00:00:04Z b"]) == ["a", "b"]


def test_a_node_in_another_time_zone() -> None:
    place = Place()
    read(place, ["2026-01-01T02:00:00.5+02:00 a"])
    assert place.resume() == {"sinceTime": "2026-01-01T00:00:00Z"}
    assert read(place, ["2026-01-01T02:00:00.5+02:00 a", "2026-01-01T00:00:00.6Z b"]) == ["b"]


@pytest.mark.parametrize("line", ["", "no stamp", "2026-01-01 half"])
def test_a_line_without_a_stamp_is_kept(line: str) -> None:
    assert Place().take(line) == line

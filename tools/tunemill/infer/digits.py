"""Numbers between two bounds as grammars for llama.cpp (GBNF), digit by digit."""

from __future__ import annotations

from collections.abc import Callable

FARTHEST = 10**15 - 1  # where no bound is given: every integer up to here is exact as a double
DECIMALS = '("." [0-9]{1,15})?'
NO_DECIMALS = '("." "0"{1,15})?'


def integers(low: int | None, high: int | None) -> str:
    """Return the grammar of the integers from ``low`` to ``high``, without leading zeros.

    Raises:
        ValueError: there is none.
    """
    return _signed(low, high, _naturals, 1)


def numbers(low: int | None, high: int | None) -> str:
    """Return the grammar of the decimal numbers from ``low`` to ``high``, both included.

    Raises:
        ValueError: there is none.
    """
    return _signed(low, high, _decimals, 0)


def _signed(low: int | None, high: int | None, unsigned: Callable[[int, int], str], nearest: int) -> str:
    """Put numbers with a sign, ``nearest`` or more behind it, before those without."""
    low = min(-FARTHEST, high or 0) if low is None else low
    high = max(FARTHEST, low) if high is None else high
    if low > high:
        raise ValueError(f"no number is from {low} to {high}")
    negative = [f'"-" {unsigned(max(nearest, -high), -low)}'] if low < 0 else []
    positive = [unsigned(max(0, low), high)] if high >= 0 else []
    return f"({' | '.join([*negative, *positive])})"


def _decimals(low: int, high: int) -> str:
    """Numbers between two natural ones: whatever is below the upper one may go on behind the point."""
    below = [f"{_naturals(low, high - 1)} {DECIMALS}"] if low < high else []
    highest = f'"{high}" {NO_DECIMALS}'
    return f"({' | '.join([*below, highest])})"


def _naturals(low: int, high: int) -> str:
    parts = []
    for length in range(len(str(low)), len(str(high)) + 1):
        least, most = (10 ** (length - 1) if length > 1 else 0), 10**length - 1
        parts.append(_alike_long(str(max(low, least)), str(min(high, most))))
    return f"({' | '.join(parts)})"


def _alike_long(low: str, high: str) -> str:
    """Numbers between two of equally many digits."""
    rest = len(low) - 1
    if set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}:
        return _digit(low[0], high[0]) + (f" [0-9]{{{rest}}}" if rest else "")
    if low[0] == high[0]:
        return f"{_digit(low[0], low[0])} {_alike_long(low[1:], high[1:])}"
    parts = [f"{_digit(low[0], low[0])} {_alike_long(low[1:], '9' * rest)}"]
    if int(high[0]) - int(low[0]) > 1:
        parts.append(f"{_digit(str(int(low[0]) + 1), str(int(high[0]) - 1))} [0-9]{{{rest}}}")
    parts.append(f"{_digit(high[0], high[0])} {_alike_long('0' * rest, high[1:])}")
    return f"({' | '.join(parts)})"


def _digit(low: str, high: str) -> str:
    return f"[{low}]" if low == high else f"[{low}-{high}]"

r"""Regular expressions as grammars for llama.cpp (GBNF): what the grammar allows, the pattern matches whole.

Python's own parser reads the pattern, so it means what ``re.fullmatch(pattern, text, re.ASCII)`` says:
``\d``, ``\w`` and ``\s`` are those of ASCII. What no grammar can say (look-around, back references) is
refused, and so is what llama.cpp would take for something else (a repetition of more than 2000).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

_parser: Any = import_module("re._parser")  # unknown to type checkers; the same tree since Python 2

MOST_REPEATS = 2000  # llama.cpp reads a larger upper bound as none
EMPTY = '""'

Ranges = tuple[tuple[int, int], ...]
"""Code points, as inclusive ranges that ascend and do not touch."""
Spelling = Callable[[Ranges], str]
"""How one character out of some is written in a grammar, as one item."""

EVERY: Ranges = ((0x1, 0xD7FF), (0xE000, 0x10FFFF))  # no NUL, which ends llama.cpp's texts, no surrogates
_CATEGORIES: dict[str, Ranges] = {
    "DIGIT": ((0x30, 0x39),),
    "WORD": ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)),
    "SPACE": ((0x9, 0xD), (0x20, 0x20)),
}
_ESCAPES = {
    "\t": r"\t",
    "\n": r"\n",
    "\r": r"\r",
    "\\": r"\\",
    '"': r"\"",
    "[": r"\[",
    "]": r"\]",
    "-": r"\-",
}


def literal(text: str) -> str:
    """Return the grammar of exactly this text."""
    return '"' + "".join(character if character in "-[]" else _spell(character) for character in text) + '"'


def one_of(ranges: Ranges) -> str:
    """Return the grammar of one character out of ``ranges``."""
    return "[" + "".join(_spell_range(*bounds) for bounds in ranges) + "]"


def union(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return ranges in any order as ones that ascend and do not touch."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def complement(ranges: Ranges) -> Ranges:
    """Return every other character."""
    left = []
    for low, high in EVERY:
        for start, stop in ranges:
            if start <= high and stop >= low:
                if start > low:
                    left.append((low, start - 1))
                low = max(low, stop + 1)
        if low <= high:
            left.append((low, high))
    return tuple(left)


def repeated(item: str, least: int, most: int | None) -> str:
    """Return ``item`` at least and at most so many times, ``None`` for any number.

    Raises:
        ValueError: llama.cpp cannot count so far.
    """
    if max(least, most or 0) > MOST_REPEATS:
        raise ValueError(f"more than {MOST_REPEATS} repetitions of one thing: llama.cpp counts no further")
    if (least, most) == (1, 1):
        return item
    short = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((least, most))
    if short:
        return item + short
    return f"{item}{{{least},{'' if most is None else most}}}" if most != least else f"{item}{{{least}}}"


def pattern_rule(pattern: str, spelling: Spelling = one_of) -> str:
    """Return the grammar, as the right side of a rule, of the texts that a pattern matches whole.

    Raises:
        ValueError: it is malformed, or says what no grammar can.
    """
    try:
        return _Translator(spelling).sequence(_parsed(pattern))
    except (re.error, OverflowError) as error:
        raise ValueError(f"no regular expression: {error}") from error
    except RecursionError as error:
        raise ValueError("too many parentheses within each other") from error


def _parsed(pattern: str) -> list[tuple[Any, Any]]:
    """Return the parser's items, without the anchors at the two ends."""
    parsed = _parser.parse(pattern, re.ASCII)
    if parsed.state.flags & ~re.ASCII:
        raise ValueError("flags such as (?i) are not possible: write out what they stand for")
    items = list(parsed)
    items = items[bool(items) and _is_anchor(items[0], "BEGINNING") :]
    return items[: len(items) - (bool(items) and _is_anchor(items[-1], "END"))]


class _Translator:
    """Walks the parser's tree: pairs of an operation's name and its arguments."""

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling

    def sequence(self, items: Iterable[tuple[Any, Any]]) -> str:
        return " ".join(self._item(str(operation), argument) for operation, argument in items) or EMPTY

    def _item(self, operation: str, argument: Any) -> str:
        characters = _characters(operation, argument)
        if characters is not None:
            if not characters:
                raise ValueError("a set of characters is empty")
            return self._spelling(characters)
        if operation == "BRANCH":
            return f"({' | '.join(self.sequence(branch) for branch in argument[1])})"
        if operation == "SUBPATTERN":
            _, added, removed, inner = argument
            if added or removed:
                raise ValueError("flags such as (?i:) are not possible: write out what they stand for")
            return f"({self.sequence(inner)})"
        if operation in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeat(*argument)
        if operation == "AT":
            raise ValueError("^ and $ can only stand at the two ends, and there they are not needed")
        raise ValueError(
            f"{operation.lower().replace('_', ' ')} is not possible in a grammar: leave out look-around, "
            "back references and possessive repetitions"
        )

    def _repeat(self, least: int, most: Any, inner: Any) -> str:
        unbounded = most is _parser.MAXREPEAT
        if unbounded and inner.getwidth()[0] == 0:
            raise ValueError("something that may be empty is repeated without end, as in (a*)*")
        return repeated(f"({self.sequence(inner)})", least, None if unbounded else most)


def _characters(operation: str, argument: Any) -> Ranges | None:
    """Return what a part of a pattern that stands for one character matches; None for other parts."""
    if operation == "LITERAL":
        return _within(((argument, argument),))
    if operation == "NOT_LITERAL":
        return complement(((argument, argument),))
    if operation == "ANY":
        return complement(((0xA, 0xA),))
    if operation != "IN":
        return None
    negated = str(argument[0][0]) == "NEGATE"
    found = union(bounds for part in argument[negated:] for bounds in _members(str(part[0]), part[1]))
    return complement(found) if negated else _within(found)


def _members(kind: str, argument: Any) -> Ranges:
    if kind == "LITERAL":
        return ((argument, argument),)
    if kind == "RANGE":
        return (tuple(argument),)
    category = str(argument).removeprefix("CATEGORY_")
    known = _CATEGORIES[category.removeprefix("NOT_")]
    return complement(known) if category.startswith("NOT_") else known


def _within(ranges: Ranges) -> Ranges:
    """Leave out what no text has."""
    return complement(complement(ranges))


def _is_anchor(item: Sequence[Any], where: str) -> bool:
    return str(item[0]) == "AT" and str(item[1]) in (f"AT_{where}", f"AT_{where}_STRING")


def _spell_range(low: int, high: int) -> str:
    return _spell(chr(low)) if low == high else f"{_spell(chr(low))}-{_spell(chr(high))}"


def _spell(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    if character.isascii() and character.isprintable() and character != "^":
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

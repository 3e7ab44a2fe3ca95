"""TAT-QA's exact match and numeracy-aware F1 (Zhu et al. 2021, arXiv 2105.07624), of answers written as text.

What its own script makes of an answer and its scale is made here of one text: one part or several,
separated by ";", and a scale as the last word: ``12.6 million``, ``2019; 2018``, ``the US dollar``.

- A number is compared by its value to two decimals times its scale: ``1.5 million``, ``$1,500,000`` and
  ``1,500 thousand`` are equal, and so are ``5 %`` and ``5 percent``. One number without a scale may also be
  a share: ``0.0512`` is ``5.12 %``.
- The scale at the end is that of all parts, also of texts, unless an earlier part has one of its own.
- Exact match: the same words after the parts were put in order as they are spelt. F1 is over the set of these
  words, a number being one word. Where gold is one number it is the exact match: half a number is none.

The script's oddities are kept, so that figures can be set beside published ones: ``(3)`` is -3, ``(1,200)``
is 1200.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from functools import lru_cache

KIND = "numbers-and-spans"
KINDS = ("number", "span", "spans")
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "percent": 0.01}
LAST_WORDS = ("thousand", "million", "billion", "percent")
NUMBER = re.compile(r"[-+]?(?:[0-9]{1,20}(?:\.[0-9]{0,12})?|\.[0-9]{1,12})")
UNIT = re.compile(r"[\d.]\s?([a-zA-Z]+)")
NEGATIVE = re.compile(r"\([\d.\s]+\)")
PERCENT = re.compile(r"[\d.\s]%")
ARTICLES = re.compile(r"\b(?:an?|the)\b")
AROUND = str.maketrans("", "", "$€£¥%()[],\"'\\")
PUNCTUATION = str.maketrans("", "", string.punctuation)
TO_CENTS, TO_SHARES = 2, 4


def score(gold: str, answer: str) -> tuple[float, float]:
    """Return exact match, 0 or 1, and F1: of the best reading of the answer."""
    (parts, scale), wanted = _parts(answer), _words(gold, TO_CENTS)
    if not parts:
        return 0.0, 0.0
    readings = (TO_CENTS, TO_SHARES) if len(parts) == 1 and not scale else (TO_CENTS,)
    exact, f1 = max(_compared(wanted, _words(answer, decimals)) for decimals in readings)
    return exact, exact if kind(gold) == "number" else f1


def kind(gold: str) -> str:
    """Return which of ``KINDS`` an answer is."""
    parts, _ = _parts(gold)
    if len(parts) > 1:
        return "spans"
    return "number" if parts and _value(parts[0]) is not None else "span"


def _compared(wanted: tuple[str, ...], given: tuple[str, ...]) -> tuple[float, float]:
    gold, answer = set(wanted), set(given)
    both = len(gold) + len(answer)
    return float(wanted == given), 2 * len(gold & answer) / both if both else 1.0


@lru_cache(maxsize=4096)
def _parts(answer: str) -> tuple[tuple[str, ...], str]:
    """Return the parts of an answer, in order as they are spelt, and the scale of all."""
    parts = [part for part in map(str.strip, answer.split(";")) if part]
    ends = [_last_word(part) for part in parts]
    if not parts or not ends[-1] or any(ends[:-1]):
        return tuple(sorted(parts)), ""
    parts[-1] = parts[-1][: -len(ends[-1])].strip()
    return tuple(sorted(parts)), ends[-1]


def _last_word(part: str) -> str:
    """Return the scale at the end of a part, which has something before it; else nothing."""
    *before, last = part.lower().split()
    return last if before and last in LAST_WORDS else ""


@lru_cache(maxsize=4096)
def _words(answer: str, decimals: int) -> tuple[str, ...]:
    """Return what is compared of an answer, its numbers rounded to ``decimals`` before the scale."""
    parts, scale = _parts(answer)
    return tuple(word for part in parts for word in _words_of(part, scale, decimals))


def _words_of(part: str, scale: str, decimals: int) -> Iterator[str]:
    value = _value(part)
    if value is not None:
        value = value if "%" in part else round(value, decimals) * SCALES.get(scale, 1)
        yield str(float(f"{value:.4f}"))
        return
    for word in f"{part} {scale}".lower().split():
        bare = word if _value(word) is not None else word.translate(PUNCTUATION)
        number = _value(bare)
        yield from ARTICLES.sub(" ", bare).split() if number is None else [str(number)]


def _value(text: str) -> float | None:
    """Return the value of a text that is a number, after which only a scale may follow, then anything."""
    words = [bare for bare in (word.translate(AROUND) for word in text.split()) if bare]
    if not words or not NUMBER.fullmatch(words[0]) or (len(words) > 1 and _scale(words[1]) == 1):
        return None
    digits = words[0].rstrip(".")
    unit = UNIT.search(text)
    size = (float(digits) if "." in digits else int(digits)) * (_scale(unit[1]) if unit else 1)
    return round(size * (-1 if NEGATIVE.search(text) else 1) * (0.01 if PERCENT.search(text) else 1), 4)


def _scale(word: str) -> float:
    return next((size for name, size in SCALES.items() if name in word.lower()), 1)

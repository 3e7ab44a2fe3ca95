"""TAT-QA's exact match and numeracy-aware F1 (Zhu et al. 2021, arXiv 2105.07624; Dua et al. 2019,
arXiv 1903.00161), of answers written as text.

An answer is one item or several, separated by ";": ``12.6 million``, ``2019; 2018``, ``the US dollar``.

- A number is compared by its value times its scale, to two decimals in the scale of the gold answer:
  ``1.5 million``, ``$1,500,000`` and ``1,500 thousand`` are equal, and so are ``5 %``, ``5 percent`` and
  ``0.05``. Parentheses mean negative, as in financial reports. A wrong sign or scale is wrong.
- The scale after the last of several numbers is that of all which have none of their own.
- Items match in any order, each with one other, in the way that is best for the whole.
- F1 of a number is 1 or 0. F1 of a text is over its set of words, and 0 where the gold text has numbers
  of which the answer has none. The F1 of several items is the sum over the larger number of items.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_UP, Context, Decimal
from functools import lru_cache

import numpy as np

KIND = "numbers-and-spans"
KINDS = ("number", "span", "spans")
SCALES = {
    "": Decimal(1),
    "%": Decimal("0.01"),
    "percent": Decimal("0.01"),
    "thousand": Decimal(10) ** 3,
    "thousands": Decimal(10) ** 3,
    "million": Decimal(10) ** 6,
    "millions": Decimal(10) ** 6,
    "billion": Decimal(10) ** 9,
    "billions": Decimal(10) ** 9,
}
NUMBER = re.compile(  # over a text with single spaces, so that nothing is tried twice
    r"(?:[$€£¥] ?)?(?P<open>\()? ?(?P<sign>[-+])? ?(?:us|hk|au|rm|usd|eur|gbp|rmb)? ?[$€£¥]? ?(?P<second>-)?"
    r"(?P<digits>\d{1,3}(?:,\d{3}){1,6}(?:\.\d{0,12})?|\d{1,20}(?:\.\d{0,12})?|\.\d{1,12})"
    r" ?(?P<inside>%)? ?(?P<close>\))? ?(?P<scale>%|[a-z]+)?\.?"
)
BETWEEN = re.compile(r"[\s\-\u2013\u2014/]+")
EDGES = "\"'`.,:;!?()[]{}<>*_$€£¥%\u2018\u2019\u201c\u201d"  # and curly quotes
LONGEST = 24  # characters of a word that is read as a number
ARTICLES = frozenset(("a", "an", "the"))
CENT = Decimal("0.01")
ROUNDED = Context(prec=60, rounding=ROUND_HALF_UP)


@dataclass(frozen=True)
class Item:
    """One part of an answer: a number, or a text."""

    words: tuple[str, ...]
    """As they are compared; numbers in one spelling."""
    number: Decimal | None = None
    """Before the scale, negative in parentheses."""
    scale: str = ""

    def equals(self, other: Item) -> bool:
        """Tell whether another item is the same as this one of a gold answer."""
        if self.number is None or other.number is None:
            return self.number is other.number and self.words == other.words
        scale = SCALES[self.scale]
        here, there = self.number, other.number * SCALES[other.scale] / scale
        return here.quantize(CENT, context=ROUNDED) == there.quantize(CENT, context=ROUNDED)

    def f1(self, other: Item) -> float:
        """Return how much of this item of a gold answer another is."""
        if self.number is not None:
            return float(self.equals(other))
        wanted, given = set(self.words), set(other.words)
        figures = {word for word in wanted if _is_number(word)}
        if (figures and not figures & given) or not wanted or not given:
            return float(wanted == given)
        return 2 * len(wanted & given) / (len(wanted) + len(given))


def score(gold: str, answer: str) -> tuple[float, float]:
    """Return exact match, 0 or 1, and F1."""
    wanted, given = items(gold), items(answer)
    if not wanted or not given:
        return (float(wanted == given),) * 2
    matched = _best([[float(one.equals(other)) for other in given] for one in wanted])
    larger = max(len(wanted), len(given))
    return float(matched == larger), _best([[one.f1(other) for other in given] for one in wanted]) / larger


def kind(gold: str) -> str:
    """Return which of ``KINDS`` an answer is."""
    parts = items(gold)
    if len(parts) > 1:
        return "spans"
    return "number" if parts and parts[0].number is not None else "span"


@lru_cache(maxsize=4096)
def items(answer: str) -> tuple[Item, ...]:
    """Return the parts of an answer."""
    plain = unicodedata.normalize("NFKC", answer).replace("\N{MINUS SIGN}", "-").lower()
    found = [_item(part) for part in plain.split(";") if part.strip()]
    if found and all(one.number is not None for one in found):
        found = [one if one.scale else replace(one, scale=found[-1].scale) for one in found]
    return tuple(found)


def _item(part: str) -> Item:
    words = tuple(word for word in map(_word, BETWEEN.split(part)) if word and word not in ARTICLES)
    found = NUMBER.fullmatch(" ".join(part.split()))
    if not found or bool(found["open"]) != bool(found["close"]):
        return Item(words)
    scale = found["scale"] or found["inside"] or ""
    if scale not in SCALES:
        return Item(words)
    negative = found["sign"] == "-" or found["second"] == "-" or found["open"]
    size = Decimal(found["digits"].replace(",", ""))
    return Item(words, -size if negative else size, scale)


def _word(text: str) -> str:
    """Return a word as it is compared; ``1,200.0`` and ``1200`` are the same."""
    bare = text.strip(EDGES)
    plain = bare.replace(",", "")
    return f"{Decimal(plain).normalize():f}" if _is_number(plain) else bare


def _is_number(word: str) -> bool:
    return word.replace(".", "", 1).isdecimal() and word.isascii() and len(word) <= LONGEST


def _best(table: list[list[float]]) -> float:
    """Return the largest sum of one-to-one matches in ``(gold items, given items)``."""
    from scipy.optimize import linear_sum_assignment

    scored = np.array(table)
    return float(scored[linear_sum_assignment(scored, maximize=True)].sum())

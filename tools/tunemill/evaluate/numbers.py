"""TAT-QA's exact match and numeracy-aware F1 (Zhu et al. 2021, arXiv 2105.07624; Dua et al. 2019,
arXiv 1903.00161), of answers written as text.

An answer is one item or several, separated by ";": ``12.6 million``, ``2019; 2018``, ``the US dollar``.

- A number is compared by its value to two decimals times its scale: ``1.5 million``, ``$1,500,000`` and
  ``1,500 thousand`` are equal, and so are ``5 %`` and ``5 percent``. Parentheses mean negative, as in
  financial reports. A wrong sign or scale is wrong. One number without a scale may also be a share:
  ``0.0512`` is ``5.12 %``.
- The scale after the last of several numbers is that of all which have none of their own.
- Exact match: the same items, in any order.
- F1 is over the set of words of all items, a number being one word, its value. Where gold is one number it is
  the exact match: half a number is none.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_UP, Context, Decimal
from functools import lru_cache

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
BETWEEN = re.compile(r"[\s\-\u2013\u2014]+")
EDGES = "\"'`.,:;!?()[]{}<>*_$€£¥%\u2018\u2019\u201c\u201d"  # and curly quotes
LONGEST = 24  # characters of a word that is read as a number
ARTICLES = frozenset(("a", "an", "the"))
CENT, SHARE = Decimal("0.01"), Decimal("0.0001")
ROUNDED = Context(prec=60, rounding=ROUND_HALF_UP)


@dataclass(frozen=True)
class Item:
    """One part of an answer: a number, or a text."""

    text: tuple[str, ...]
    """Its words as they are compared."""
    number: Decimal | None = None
    """Before the scale, negative in parentheses."""
    scale: str = ""

    def words(self, digits: Decimal) -> tuple[str, ...]:
        """Return what is compared: the words, or the value of the number rounded to ``digits``."""
        if self.number is None:
            return self.text
        value = self.number.quantize(digits, context=ROUNDED) * SCALES[self.scale]
        return (f"{value.quantize(SHARE, context=ROUNDED) + 0:f}",)  # + 0: there is no negative zero


def score(gold: str, answer: str) -> tuple[float, float]:
    """Return exact match, 0 or 1, and F1: of the best reading of the answer."""
    wanted, given = items(gold), items(answer)
    readings = [CENT, SHARE] if len(given) == 1 and not given[0].scale else [CENT]
    return max(_score(wanted, given, digits) for digits in readings)


def _score(wanted: tuple[Item, ...], given: tuple[Item, ...], digits: Decimal) -> tuple[float, float]:
    one, two = [item.words(CENT) for item in wanted], [item.words(digits) for item in given]
    exact = float(sorted(one) == sorted(two))
    if len(wanted) == 1 and wanted[0].number is not None:
        return exact, exact
    gold, answer = ({word for words in side for word in words} for side in (one, two))
    return exact, 2 * len(gold & answer) / max(len(gold) + len(answer), 1) if gold or answer else exact


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

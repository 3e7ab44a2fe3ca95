"""A task's prompt: text with places for columns, and what the order of its parts costs at inference.

Inference computes a beginning that prompts share once, so a prompt is cheapest when what all prompts say
comes first, then the text, then the dimension it is asked about. What stands later than it need is
computed again for every row, and nobody sees it but in the time that 30,000 texts take.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from tunemill.data.labels import label_text
from tunemill.errors import BadDataError

DIMENSION, DESCRIPTION, LABELS = "dimension", "description", "labels"
"""Places that no column of the data fills."""

SAME, COLUMN, ASPECT = "same", "column", "aspect"
"""What all prompts say, what differs by text, what differs by dimension."""

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}\"\n]{1,64})\}")


def fill(template: str, values: Mapping[str, Any], where: str) -> str:
    """Put values into ``{column}`` places; ``{{`` and ``}}`` are braces.

    Raises:
        BadDataError: the template names a column that the row does not have.
    """

    def place(match: re.Match[str]) -> str:
        name = match[1]
        if name is None:
            return match[0][0]
        if values.get(name) is None:
            near = get_close_matches(name, list(values), 1)
            hint = f"did you mean {{{near[0]}}}?" if near and near[0] != name else "double a literal brace"
            raise BadDataError(f"{where} has no {name!r}, which the prompt asks for: {hint}")
        return label_text(values[name])

    return _FIELD.sub(place, template)


def places(template: str) -> frozenset[str]:
    """Return the names of a template's places."""
    return frozenset(match[1] for match in _FIELD.finditer(template) if match[1])


@dataclass(frozen=True)
class Order:
    """What the order of a template's parts has prompts compute again, places left out."""

    late: str
    """What all prompts say, after what differs in every row."""
    between: str
    """What all prompts say, after the text but before the dimension: computed once for each text."""
    dimension_first: bool
    """A dimension is named before the text, so that a text's rows share nothing of it."""


def order(template: str, dimensions: bool) -> Order:
    """Tell which parts of a prompt stand later than they need."""
    late: list[str] = []
    between: list[str] = []
    dimension_first = False
    seen: set[str] = set()
    for kind, text in _pieces(template, dimensions):
        if kind != SAME:
            dimension_first = dimension_first or (kind == COLUMN and ASPECT in seen)
            seen.add(kind)
        elif COLUMN in seen:
            (between if dimensions and ASPECT not in seen else late).append(text)
    return Order("".join(late), "".join(between), dimension_first)


def _pieces(template: str, dimensions: bool) -> Iterator[tuple[str, str]]:
    end = 0
    for match in _FIELD.finditer(template):
        yield SAME, template[end : match.start()]
        name, end = match[1], match.end()
        if name is None or name == LABELS:
            yield SAME, match[0]
        else:
            yield (ASPECT if dimensions and name in (DIMENSION, DESCRIPTION) else COLUMN), match[0]
    yield SAME, template[end:]


def computed_again(
    template: str,
    listed: str,
    dimensions: Sequence[tuple[str, str]],
    texts: Sequence[str],
    tokenizer: Any,
) -> float:
    """Return about how many tokens of each prompt are computed again only because of where they stand.

    Parts are tokenized apart, and of the columns only the text is counted, so this is an estimate.

    Args:
        template: the user message.
        listed: what ``{labels}`` stands for.
        dimensions: names and descriptions; none where a text is asked about once.
        texts: some of the texts; not empty.
        tokenizer: the base model's.
    """

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    found = order(template, bool(dimensions))
    values = {LABELS: listed}
    again = float(tokens(fill(found.late, values, "prompt")))
    if not dimensions:
        return again
    again += tokens(fill(found.between, values, "prompt")) / len(dimensions)
    if found.dimension_first:
        text = sum(map(tokens, texts)) / len(texts)
        named = places(template)
        dimension = sum(
            tokens(name if DIMENSION in named else "") + tokens(said if DESCRIPTION in named else "")
            for name, said in dimensions
        ) / len(dimensions)
        again += max(0.0, text * (1 - 1 / len(dimensions)) - dimension)
    return again

"""Types of single tensors, as ``llama-quantize --tensor-type`` takes them: ``PATTERN=TYPE``.

The pattern is a regular expression that is looked for in a tensor's name; of several that are found
the first counts. llama.cpp ignores one that is found nowhere; here that is an error, because a
mistyped name would quietly give another model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tunemill.errors import UsageError
from tunemill.gguf.types import tensor_type


@dataclass(frozen=True)
class Override:
    """The type of all tensors whose name holds a pattern."""

    pattern: str
    type: str

    @property
    def entry(self) -> tuple[str, int]:
        """What llama.cpp's quantizer takes."""
        return self.pattern, tensor_type(self.type)


def parse_overrides(words: Sequence[str]) -> list[Override]:
    """Read ``PATTERN=TYPE`` words.

    Raises:
        UsageError: one is not of that form, its pattern is no regular expression, or its type unknown.
    """
    return [_parse(word) for word in words]


def refuse_unmatched(overrides: Iterable[Override], names: Sequence[str]) -> None:
    """See that every pattern is found in some tensor's name.

    Raises:
        UsageError: naming the first that is not.
    """
    for override in overrides:
        if not any(re.search(override.pattern, name) for name in names):
            raise UsageError(
                f"tensor_type {override.pattern}={override.type}: no tensor of this model is called so; "
                f"there are {names[0]}, {names[-1]} and {len(names) - 2} others"
            )


def _parse(word: str) -> Override:
    pattern, equals, name = word.rpartition("=")
    if not equals or not pattern or not name:
        raise UsageError(f"tensor_type takes PATTERN=TYPE, got {word!r}: for example attn_v=Q6_K")
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"tensor_type {word}: {pattern!r} is no regular expression: {error}") from error
    tensor_type(name)
    return Override(pattern, name)

"""llama.cpp's grammars: which token may come next in an answer that is held to a form.

A grammar is compiled once for a model; each answer has a state of its own. Asking about one token costs
microseconds, about a whole vocabulary milliseconds, so the token that would be chosen is asked about first.
Tokens without a spelling of their own (``<s>`` and its like) are refused even where their name would fit.

Run as ``python -m tunemill.infer.grammar`` with a grammar on stdin: exit status 0, or 1 with the reason on
stdout. llama.cpp writes what is wrong with a grammar to stderr and may abort, so a child process finds out.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from tunemill.errors import ConfigurationError
from tunemill.infer.model import Model, last_error, listen

_UNSPOKEN = llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN | llama_cpp.LLAMA_TOKEN_ATTR_CONTROL
_TOKEN = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data

Flags = npt.NDArray[np.bool_]


class Grammar:
    """A grammar for one model; close it.

    Raises:
        ConfigurationError: llama.cpp refuses it.
    """

    def __init__(self, model: Model, text: str) -> None:
        self._vocab = llama_cpp.llama_model_get_vocab(model.handle)
        self._handle = _compile(self._vocab, text)
        if not self._handle:
            raise ConfigurationError(f"llama.cpp refuses the grammar: {last_error() or 'no reason given'}")
        self._ends = _flags(model.vocabulary, lambda token: llama_cpp.llama_vocab_is_eog(self._vocab, token))
        attribute = llama_cpp.llama_vocab_get_attr
        self._spoken = self._ends | _flags(
            model.vocabulary, lambda token: not attribute(self._vocab, token) & _UNSPOKEN
        )

    def start(self) -> State:
        """Return the state at an answer's beginning, to be closed."""
        return State(llama_cpp.llama_sampler_clone(self._handle), self._spoken, self._ends)

    def close(self) -> None:
        """Free it; safe to call twice."""
        if self._handle:
            llama_cpp.llama_sampler_free(self._handle)
            self._handle = None


class State:
    """How far one answer has come in its grammar."""

    def __init__(self, handle: Any, spoken: Flags, ends: Flags) -> None:
        self._handle = handle
        self._spoken = spoken
        self._ends = ends

    def permits(self, token: int) -> bool:
        """Tell whether a token may come next."""
        return bool(self._spoken[token]) and bool(self._ask(np.array([token]))[0])

    def permitted(self) -> Flags:
        """Return ``(vocabulary,)`` whether each token may come next."""
        return self._spoken & self._ask(np.arange(len(self._spoken)))

    def may_end(self) -> bool:
        """Tell whether the answer is whole as it stands."""
        return bool(self._ask(np.flatnonzero(self._ends)).any())

    def accept(self, token: int) -> None:
        """Go on by a token that is permitted; any other makes llama.cpp end the process."""
        llama_cpp.llama_sampler_accept(self._handle, token)

    def close(self) -> None:
        """Free it; safe to call twice."""
        if self._handle:
            llama_cpp.llama_sampler_free(self._handle)
            self._handle = None

    def _ask(self, tokens: npt.NDArray[np.int64]) -> Flags:
        candidates = np.zeros(len(tokens), _TOKEN)
        candidates["id"] = tokens
        array = llama_cpp.llama_token_data_array(
            data=candidates.ctypes.data_as(llama_cpp.llama_token_data_p),
            size=len(tokens),
            selected=-1,
            sorted=False,
        )
        llama_cpp.llama_sampler_apply(self._handle, ctypes.byref(array))
        return np.asarray(candidates["logit"] == 0)  # the refused ones are minus infinity


def _compile(vocab: Any, text: str) -> Any:
    last_error()
    return llama_cpp.llama_sampler_init_grammar(vocab, text.encode(), b"root")


def _flags(count: int, tell: Any) -> Flags:
    return np.fromiter((tell(token) for token in range(count)), np.bool_, count)


def main() -> int:
    """Compile the grammar on stdin without a model."""
    listen()
    handle = _compile(None, sys.stdin.buffer.read().decode())
    if handle:
        return 0
    sys.stdout.write(f"{last_error()}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())

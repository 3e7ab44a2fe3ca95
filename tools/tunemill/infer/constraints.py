"""What free answers are held to: one JSON schema, regular expression, list of choices or grammar.

All four become a grammar in llama.cpp's notation (GBNF), which decides token by token what may come next.
An answer may begin with a space, as models with SentencePiece vocabularies do; it is taken off again.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunemill.errors import UsageError
from tunemill.infer.patterns import literal, pattern_rule
from tunemill.infer.schemas import schema_grammar
from tunemill.llama import libraries

if TYPE_CHECKING:
    from tunemill.infer.config import InferConfig

KEYS = ("json_schema", "regex", "choices", "grammar")
MOST_BYTES = 1 << 20  # of a file; grammars in use have some kB
SECONDS = 120  # to read a grammar; those in use take milliseconds
NEEDS_A_MODEL = "no vocab to parse token"  # a grammar with <tokens>: only a vocabulary can tell


@dataclass(frozen=True)
class Constraint:
    """One of ``KEYS`` with its value."""

    key: str
    value: Any

    def gbnf(self) -> str:
        """Return it as a grammar with the rule ``root``.

        Raises:
            ValueError: no grammar can promise what is asked.
        """
        if self.key == "json_schema":
            return schema_grammar(self.value)
        if self.key == "regex":
            return f'root ::= " "? {pattern_rule(self.value)}\n'
        if self.key == "choices":
            return f'root ::= " "? ({" | ".join(literal(choice) for choice in self.value)})\n'
        return str(self.value)

    def read(self, text: str) -> str:
        """Return the answer that a text allowed by the grammar holds."""
        if self.key == "grammar" or (self.key == "regex" and re.fullmatch(self.value, text, re.ASCII)):
            return text
        return text.removeprefix(" ")


def constraint_of(settings: Mapping[str, Any]) -> Constraint | None:
    """Return the constraint among some settings, if any is set.

    Raises:
        ValueError: there are several.
    """
    chosen = [Constraint(key, settings[key]) for key in KEYS if settings[key] is not None]
    if len(chosen) > 1:
        raise ValueError(f"{chosen[0].key} and {chosen[1].key} exclude each other: keep one")
    return chosen[0] if chosen else None


def read_schema(given: Any) -> Any:
    """Return a JSON schema that is given itself, as JSON text, or as the name of a file.

    Raises:
        ValueError: there is no such file, or it holds no JSON.
    """
    try:
        if not isinstance(given, str):  # YAML's keys may be numbers
            return json.loads(json.dumps(given, allow_nan=False))
        return json.loads(given if given.lstrip().startswith("{") else _file(given, "a JSON object"))
    except (json.JSONDecodeError, TypeError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error


def read_grammar(given: Any) -> Any:
    """Return a grammar that is given itself, or as the name of a file.

    Raises:
        ValueError: there is no such file, or a NUL, where llama.cpp would stop reading.
    """
    if not isinstance(given, str):
        return given
    text = given if "::=" in given else _file(given, "rules with ::=")
    if "\0" in text:
        raise ValueError("it holds a NUL: write it as \\x00, or leave it out")
    return text


def read_choices(given: Any) -> Any:
    """Return choices as texts, each once, with no space around.

    Raises:
        ValueError: they are not.
    """
    if not isinstance(given, Sequence) or isinstance(given, str):
        return given
    for choice in given:
        if isinstance(choice, bool) or not str(choice) or str(choice) != str(choice).strip():
            raise ValueError(
                f"{choice!r} is no choice: each is a text without space around it; put yes and no in quotes"
            )
    choices = [str(choice) for choice in given]
    if len(set(choices)) < len(choices):
        raise ValueError("a choice is given twice")
    return choices


def check(config: InferConfig) -> None:
    """See that llama.cpp can read the configuration's grammar, before any input is pulled.

    Raises:
        UsageError: it cannot; says where it stopped.
        ModuleNotFoundError: llama.cpp is not installed.
    """
    constraint = config.constraint
    if constraint is None:
        return
    libraries()
    command = [sys.executable, "-m", "tunemill.infer.grammar"]
    try:
        child = subprocess.run(
            command, input=constraint.gbnf().encode(), capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"{constraint.key}: llama.cpp did not finish reading it in {SECONDS} s") from error
    if child.returncode:
        said = f"{child.stderr.decode(errors='replace')}\n{child.stdout.decode(errors='replace')}"
        if NEEDS_A_MODEL in said:
            return
        raise UsageError(f"{constraint.key}: llama.cpp cannot use it: {_reason(said, child.returncode)}")


def _reason(said: str, status: int) -> str:
    """Return the most telling of the lines that the child left."""
    for line in said.splitlines():
        what = line.partition("error parsing grammar: ")[2]
        if what:
            return what[:120]
    if status < 0:
        return f"it crashes (signal {-status})"
    return said.strip().rpartition("\n")[2] or "no reason given"


def _file(name: str, otherwise: str) -> str:
    try:
        with Path(name).open("rb") as source:
            return source.read(MOST_BYTES).decode()
    except OSError as error:
        raise ValueError(f"expected {otherwise}, or a file that can be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the file {name} is no UTF-8 text") from error

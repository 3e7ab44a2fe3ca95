"""JSON schemas as grammars for llama.cpp (GBNF): whatever the grammar allows, the schema accepts.

llama-cpp-python's own converter leaves out what it does not know (bounds of numbers), lets line breaks into
strings and breaks on backslashes in constants, so its answers may be no JSON or against the schema. Here a
keyword is honoured or refused by name; only what merely permits more, or describes, is passed over.

The dialect is JSON Schema 2020-12 (json-schema.org) with the keywords of ``KEYWORDS``. Properties come in
the order of the schema. Between the parts of a value there may be one space, or a line break with its indent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import unquote

from tunemill.infer.digits import integers, numbers
from tunemill.infer.patterns import Ranges, complement, literal, one_of, pattern_rule, repeated, union

Schema = Mapping[str, Any]
T = TypeVar("T")

KINDS: Mapping[type, str] = {dict: "object", list: "list", str: "text"}

NOTES = frozenset(
    {"$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples"}
    | {"deprecated", "readOnly", "writeOnly"}
)
"""Keywords that ask for nothing."""
KEYWORDS = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset({"minimum", "maximum"}),
    "boolean": frozenset[str](),
    "null": frozenset[str](),
}
"""What can be asked of each type."""
DATE = (
    r'([0-9]{4} "-" (("0" [13578] | "1" [02]) "-" ("0" [1-9] | [12] [0-9] | "3" [01]) | '
    r'("0" [469] | "11") "-" ("0" [1-9] | [12] [0-9] | "30") | "02-" ("0" [1-9] | "1" [0-9] | "2" [0-8])))'
)
CLOCK = '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9]'
TIME = f'({CLOCK} ":" [0-5] [0-9] ("." [0-9]{{1,6}})? ("Z" | [+\\-] {CLOCK}))'
FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": f'{DATE} "T" {TIME}',
    "uuid": '[0-9a-f]{8} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{12}',
}
"""Texts of known formats; a date has a day of its month, and never February 29."""
_UNQUOTED: Ranges = ((0x1, 0x1F), (0x22, 0x22), (0x5C, 0x5C))
SPACE = 'space ::= (" " | "\\n" [ \\t]{0,20})?'
SHARED = {
    "character": rf'{one_of(complement(_UNQUOTED))} | "\\" (["\\/bfnrt] | "u" any-unit)',
    "any-unit": "([0-9a-cA-CefEF] [0-9a-fA-F] | [dD] [0-7]) [0-9a-fA-F]{2}",  # no half of a pair
    "any-text": r'"\"" character* "\""',
    "any-number": r'"-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,15})? ([eE] [+\-]? [0-9]{1,2})?',
    "any-pair": 'any-text ":" space any-value',
    "any-object": '"{" space (any-pair ("," space any-pair)* space)? "}"',
    "any-array": '"[" space (any-value ("," space any-value)* space)? "]"',
    "any-value": 'any-object | any-array | any-text | any-number | "true" | "false" | "null"',
}
_QUOTED = {0x22: r"\"", 0x5C: r"\\", 0x8: r"\b", 0x9: r"\t", 0xA: r"\n", 0xC: r"\f", 0xD: r"\r"}


def schema_grammar(schema: Schema) -> str:
    """Return the grammar of a schema's values, which may begin with a space.

    Raises:
        ValueError: it asks for what no grammar can promise, or is no schema.
    """
    converter = _Converter(schema)
    try:
        root = converter.value(schema, "#")
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    rules = {"root": f'" "? {root}', **converter.rules, **SHARED}
    return "\n".join([*(f"{name} ::= {rule}" for name, rule in rules.items()), SPACE]) + "\n"


class _Converter:
    """Turns one schema's parts into items of a grammar; each property and reference becomes a rule."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._named: dict[str, str] = {}
        self.rules: dict[str, str] = {}

    def value(self, schema: Any, place: str) -> str:
        """Return the item of one (sub)schema; ``place`` is its JSON pointer, for complaints."""
        if schema is True or schema == {}:
            return "any-value"
        if not isinstance(schema, Mapping):
            raise ValueError(f"{place} is {json.dumps(schema)}, expected an object")
        asked = set(schema) - NOTES
        if not asked:
            return "any-value"
        for keyword, convert in (("$ref", self._reference), ("anyOf", self._any_of)):
            if keyword in asked:
                _refuse(asked - {keyword}, place, f" beside {keyword}")
                return convert(schema[keyword], place)
        if asked & {"enum", "const"}:
            _refuse(asked - {"enum", "const", "type"}, place, " beside enum or const")
            return _constants(schema, place)
        types = _types(schema, asked, place)
        _refuse(asked - {"type"}.union(*(KEYWORDS[kind] for kind in types)), place)
        return _either([getattr(self, f"_{kind}")(schema, place) for kind in types])

    def _reference(self, pointer: Any, place: str) -> str:
        if not isinstance(pointer, str) or not pointer.startswith("#"):
            raise ValueError(f"{place}/$ref is {pointer!r}: only references within the schema are possible")
        if pointer not in self._named:
            self._named[pointer] = name = self._rule("reference", "")  # may be within itself
            self.rules[name] = self.value(self._find(pointer), pointer)
        return self._named[pointer]

    def _find(self, pointer: str) -> Any:
        found: Any = self._schema
        for part in unquote(pointer).split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or key not in found:
                raise ValueError(f"nothing is at {pointer}, which a $ref names")
            found = found[key]
        return found

    def _any_of(self, schemas: Any, place: str) -> str:
        if not isinstance(schemas, list) or not schemas:
            raise ValueError(f"{place}/anyOf is no list of schemas")
        return _either([self.value(one, f"{place}/anyOf/{n}") for n, one in enumerate(schemas)])

    def _object(self, schema: Schema, place: str) -> str:
        properties, others = _given(schema, "properties", dict, place), schema.get("additionalProperties")
        required = _given(schema, "required", list, place) or []
        if unknown := [name for name in required if name not in (properties or ())]:
            raise ValueError(f"{place} requires {unknown[0]!r}, which its properties do not describe")
        if not properties:
            return self._mapping(others, place)
        pairs = {name: self._pair(name, one, place) for name, one in properties.items()}
        return f'("{{" space {self._in_order(pairs, required)} space "}}")'

    def _in_order(self, pairs: Mapping[str, str], required: Sequence[str]) -> str:
        """Return the rule of properties in their order, of which those not required may be left out.

        One rule for each says what may follow it and one what may begin with it: a single expression would
        grow with the square of the properties, and llama.cpp stops counting at 2000.
        """
        begin = follow = '""'
        for name, pair in reversed(list(pairs.items())):
            otherwise = ("", "") if name in required else (f" | {begin}", f" | {follow}")
            begin = self._rule("begin", f"{pair} {follow}{otherwise[0]}")
            follow = self._rule("follow", f'"," space {pair} {follow}{otherwise[1]}')
        return begin

    def _rule(self, kind: str, right_side: str) -> str:
        name = f"{kind}-{len(self.rules)}"
        self.rules[name] = right_side
        return name

    def _mapping(self, others: Any, place: str) -> str:
        if others is None or others is True:
            return "any-object"
        if others is False:
            return '("{" space "}")'
        pair = f'any-text ":" space {self.value(others, f"{place}/additionalProperties")}'
        return f'("{{" space ({pair} ("," space {pair})* space)? "}}")'

    def _pair(self, name: str, schema: Any, place: str) -> str:
        rule = self._rule("property", "")
        key = literal(json.dumps(name, ensure_ascii=False))
        self.rules[rule] = f'{key} ":" space {self.value(schema, f"{place}/properties/{name}")}'
        return rule

    def _array(self, schema: Schema, place: str) -> str:
        least, most = _count(schema, "minItems", place) or 0, _count(schema, "maxItems", place)
        if prefix := _given(schema, "prefixItems", list, place):
            if not least <= len(prefix) <= (len(prefix) if most is None else most):
                raise ValueError(f"{place} wants {least} to {most} items, but prefixItems has {len(prefix)}")
            items = [self.value(one, f"{place}/prefixItems/{n}") for n, one in enumerate(prefix)]
            listed = ' "," space '.join(items)
            return f'("[" space {listed} space "]")'
        if most == 0:
            return '("[" space "]")'
        if most is not None and least > most:
            raise ValueError(f"{place} wants at least {least} and at most {most} items")
        item = self._rule("item", self.value(schema.get("items", True), f"{place}/items"))
        further = repeated(f'("," space {item})', max(least - 1, 0), None if most is None else most - 1)
        some = f"{item} {further} space" if most != 1 else f"{item} space"
        return f'("[" space {some} "]")' if least else f'("[" space ({some})? "]")'

    def _string(self, schema: Schema, place: str) -> str:
        least, most = _count(schema, "minLength", place) or 0, _count(schema, "maxLength", place)
        chosen = [key for key in ("pattern", "format") if key in schema]
        if len(chosen) + (least > 0 or most is not None) > 1:
            raise ValueError(f"{place}: of pattern, format and a length, a grammar can honour one")
        if not chosen:
            if not least and most is None:
                return "any-text"
            return rf'("\"" {repeated("character", least, most)} "\"")'
        if chosen == ["pattern"]:
            pattern = _given(schema, "pattern", str, place) or ""
            try:
                return rf'("\"" {pattern_rule(pattern, _in_text)} "\"")'
            except ValueError as error:
                raise ValueError(f"{place}/pattern: {error}") from error
        if _given(schema, "format", str, place) not in FORMATS:
            raise ValueError(f"{place}/format is {schema['format']!r}, expected {', '.join(FORMATS)}")
        return rf'("\"" {FORMATS[schema["format"]]} "\"")'

    def _integer(self, schema: Schema, place: str) -> str:
        low, high = _bound(schema, "minimum", place), _bound(schema, "maximum", place)
        above, below = _bound(schema, "exclusiveMinimum", place), _bound(schema, "exclusiveMaximum", place)
        lows = [bound for bound in (low, None if above is None else above + 1) if bound is not None]
        highs = [bound for bound in (high, None if below is None else below - 1) if bound is not None]
        return integers(max(lows, default=None), min(highs, default=None))

    def _number(self, schema: Schema, place: str) -> str:
        low, high = _bound(schema, "minimum", place), _bound(schema, "maximum", place)
        return "any-number" if low is None and high is None else numbers(low, high)

    def _boolean(self, _schema: Schema, _place: str) -> str:
        return '("true" | "false")'

    def _null(self, _schema: Schema, _place: str) -> str:
        return '"null"'


def _constants(schema: Schema, place: str) -> str:
    values = [schema["const"]] if "const" in schema else schema["enum"]
    if "const" in schema and "enum" in schema:
        raise ValueError(f"{place} has const and enum: keep one")
    if not isinstance(values, list) or not values:
        raise ValueError(f"{place}/enum is no list of values")
    types = _types(schema, set(), place) if "type" in schema else list(KEYWORDS)
    fitting = [value for value in values if _type_of(value) & set(types)]
    if len(fitting) < len(values):
        raise ValueError(f"{place} has values of another type than {', '.join(types)}")
    return _either([literal(json.dumps(value, ensure_ascii=False)) for value in fitting])


def _types(schema: Schema, asked: set[str], place: str) -> list[str]:
    """Return the types a schema names, or the one that its keywords are for."""
    given = schema.get("type")
    if given is None:
        found = [kind for kind, keywords in KEYWORDS.items() if asked & keywords]
        if len(found) != 1 and found != ["integer", "number"]:
            _refuse(asked - frozenset().union(*KEYWORDS.values()), place)
            raise ValueError(f"{place} has no type: give one of {', '.join(KEYWORDS)}")
        return found[-1:]
    types = [given] if isinstance(given, str) else given
    if not isinstance(types, list) or not types or not set(map(str, types)) <= set(KEYWORDS):
        raise ValueError(f"{place}/type is {json.dumps(given)}, expected one of {', '.join(KEYWORDS)}")
    return types


def _type_of(value: Any) -> set[str]:
    if isinstance(value, bool) or value is None:
        return {"null" if value is None else "boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if float(value).is_integer() else {"number"}
    return {"string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"}


def _given(schema: Schema, keyword: str, kind: type[T], place: str) -> T | None:
    value = schema.get(keyword)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{place}/{keyword} is no {KINDS[kind]}")
    return value


def _count(schema: Schema, keyword: str, place: str) -> int | None:
    count = _bound(schema, keyword, place)
    if count is not None and count < 0:
        raise ValueError(f"{place}/{keyword} is {count}, expected 0 or more")
    return count


def _bound(schema: Schema, keyword: str, place: str) -> int | None:
    value = schema.get(keyword)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise ValueError(f"{place}/{keyword} is {json.dumps(value)}, expected an integer")
    return int(value)


def _in_text(ranges: Ranges) -> str:
    """Return the grammar of one character out of ``ranges`` within a JSON text, escaped if need be."""
    plain = complement(union([*complement(ranges), *_UNQUOTED]))
    escaped = [code for low, high in ranges for code in range(low, min(high, 0x5C) + 1) if code in _QUOTED]
    parts = [*([one_of(plain)] if plain else []), *(literal(_QUOTED[code]) for code in escaped)]
    if not parts:
        raise ValueError("a control character cannot be asked for")
    return _either(parts)


def _either(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"({' | '.join(parts)})"


def _refuse(unknown: set[str] | frozenset[str], place: str, where: str = "") -> None:
    if unknown:
        raise ValueError(
            f"{place} has {sorted(unknown)[0]!r}{where}, which no grammar here can promise: leave it out"
        )

"""Answers held to a form: whatever a model wants to say, it comes out as asked for."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import jsonschema
import numpy as np
import pyarrow.parquet
import pytest

from tunemill.errors import BadDataError, ConfigurationError, UsageError
from tunemill.infer.config import InferConfig
from tunemill.infer.constraints import Constraint, check
from tunemill.infer.engine import Engine, Size, run_of
from tunemill.infer.generate import BROKEN, CUT_OFF, STUCK, Continuation, Prompt, Sampling, cells, generate
from tunemill.infer.grammar import Grammar
from tunemill.infer.model import Model
from tunemill.infer.pool import Pool
from tunemill.infer.predict import predict

Make = Callable[..., Any]
TEXTS = [f"<s>[which part: {'read ' * (n % 5)}{n}]" for n in range(6)]


@pytest.fixture(scope="module")
def model(micro: Any) -> Iterator[Model]:
    with Model(micro.gguf) as opened:
        yield opened


def answers(
    model: Model,
    constraint: Constraint,
    tokens: int = 120,
    temperature: float = 1.0,
    texts: Sequence[str] = TEXTS,
) -> list[Continuation]:
    """Return greedy answers, or four samples of each text."""
    sampling = Sampling(tokens, temperature, 3, samples=4 if temperature else 1)
    prompts = [Prompt(number, model.tokens(text)) for number, text in enumerate(texts)]
    with (
        Pool(model, Size(0, 512, False), 1, threading.Event()) as pool,
        closing(Grammar(model, constraint.gbnf())) as grammar,
    ):
        pool.share((), cells(prompts, sampling))
        return [sample for found in generate(pool, model, prompts, sampling, grammar) for sample in found]


def whole(model: Model, constraint: Constraint, tokens: int = 120) -> list[str]:
    found = answers(model, constraint, tokens)
    assert {answer.error for answer in found} <= {
        None,
        CUT_OFF,
        BROKEN,
    }  # random weights make bytes at random
    texts = [constraint.read(answer.text) for answer in found if answer.ended and not answer.error]
    assert len(texts) > len(found) / 4
    return texts


PATTERNS = [
    r"\d{4}-\d\d",
    r"^(yes|no|maybe)$",
    r"[^\d\s\"\-\]]{2,5}",
    r"(?:ab)*?c?x",
    r"a.b",
    r"[ä-ü€\U0001F600]{3}",
    r"\w{1,4}@\w+?\.[a-z]{2}",
    r"[\W\d]{4}",
    r" a|b\x20",
    r"(|a|\\|\[)\t\"",
    r"(?P<sign>[+-])?0(\.[0-9]+)?",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_answer_matches_the_pattern_whole(model: Model, pattern: str) -> None:
    texts = whole(model, Constraint("regex", pattern), 40)
    assert all(re.fullmatch(pattern, text, re.ASCII) for text in texts)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        pytest.param(r"(a", "unterminated subpattern", id="malformed"),
        pytest.param(r"(?=a)b", "assert is not possible", id="look-ahead"),
        pytest.param(r"(a)\1", "groupref is not possible", id="back-reference"),
        pytest.param(r"(?i)a", "flags such as", id="flag"),
        pytest.param(r"(?i:a)", "flags such as", id="flag-of-a-group"),
        pytest.param(r"a^b", "only stand at the two ends", id="anchor"),
        pytest.param(r"(a*)*", "repeated without end", id="ambiguous"),
        pytest.param(r"a{3000}", "more than 2000", id="too-often"),
        pytest.param(r"a*+", "possessive", id="possessive"),
        pytest.param("(" * 300 + "a" + ")" * 300, "too many parentheses", id="deep"),
        pytest.param(r"[^\x00-\U0010ffff]", "a set of characters is empty", id="impossible"),
    ],
)
def test_patterns_that_no_grammar_can_say_are_refused(pattern: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        InferConfig(regex=pattern)
    assert "\n" not in str(caught.value.args[0] if caught.value.args else "")


SCHEMAS: dict[str, Any] = {
    "survey": {
        "type": "object",
        "properties": {
            "topic": {"enum": ["a\\b", 'c"d', "Größe", 3, None]},
            "score": {"type": "integer", "minimum": -5, "maximum": 120},
            "share": {"type": "number", "minimum": 0, "maximum": 1},
            "when": {"type": ["string", "null"], "format": "date"},
            "codes": {"type": "array", "items": {"$ref": "#/$defs/code"}, "minItems": 1, "maxItems": 3},
        },
        "required": ["score", "codes"],
        "additionalProperties": False,
        "$defs": {"code": {"type": "string", "pattern": '^[A-Z"]{2}$'}},
    },
    "optional": {"properties": {"a": {"const": 1}, "b": {"type": "boolean"}, "c": {"type": "null"}}},
    "text": {"type": "string", "minLength": 3, "maxLength": 6},
    "empty": {"type": "array", "items": {"type": "string", "maxLength": 0}, "minItems": 2, "maxItems": 2},
    "recursive": {
        "type": "object",
        "properties": {
            "v": {"type": "integer", "exclusiveMaximum": 100, "minimum": 95},
            "next": {"$ref": "#"},
        },
        "required": ["v"],
    },
    "union": {
        "anyOf": [{"type": "number", "maximum": -3}, {"type": "array", "prefixItems": [{"const": "x"}]}]
    },
    "mapping": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 2}},
    "time": {"type": "string", "format": "date-time"},
    "many": {"properties": {f"dimension_{n}": {"type": "integer", "maximum": 9} for n in range(46)}},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_is_json_of_the_schema(model: Model, name: str) -> None:
    schema = SCHEMAS[name]
    for text in whole(model, Constraint("json_schema", schema), 250):
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 9), (7, 7), (5, 1203), (-12, 34), (-205, -17), (99, 1000), (0, 0), (-1, 0)]
)
def test_integers_of_a_range_are_all_there_and_no_others(model: Model, low: int, high: int) -> None:
    schema = {"type": "integer", "minimum": low, "maximum": high}
    with closing(Grammar(model, Constraint("json_schema", schema).gbnf())) as grammar:
        for number in {*range(low - 12, high + 13), low * 10, high * 10, low // 10, high // 10}:
            assert spells(model, grammar, str(number)) == (low <= number <= high), number


@pytest.mark.parametrize(
    "text", ["-2", "-2.00", "-1.5", "-0.75", "0", "0.000", "0.999", "1", "2.1", "3", "3.0"]
)
def test_decimal_numbers_of_a_range_are_there(model: Model, text: str) -> None:
    schema = {"type": "number", "minimum": -2, "maximum": 3}
    with closing(Grammar(model, Constraint("json_schema", schema).gbnf())) as grammar:
        assert spells(model, grammar, text)
        assert not any(spells(model, grammar, bad) for bad in ("-2.01", "3.001", "4", "-3", "01", "1.", ".5"))


def spells(model: Model, grammar: Grammar, text: str) -> bool:
    """Tell whether a text of single characters is one that the grammar allows."""
    state = grammar.start()
    try:
        for byte in text.encode():
            if not state.permits(byte + 3):  # the micro model's bytes
                return False
            state.accept(byte + 3)
        return state.may_end()
    finally:
        state.close()


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        pytest.param({"type": "integer", "multipleOf": 3}, "# has 'multipleOf'", id="keyword"),
        pytest.param({"properties": {"a": {"not": {}}}}, "#/properties/a has 'not'", id="keyword-within"),
        pytest.param({"oneOf": [{"type": "null"}]}, "'oneOf'", id="one-of"),
        pytest.param({"$ref": "other.json"}, "only references within", id="foreign-reference"),
        pytest.param({"$ref": "#/$defs/a"}, "nothing is at #/", id="dangling-reference"),
        pytest.param({"type": "object", "required": ["a"]}, "requires 'a'", id="required"),
        pytest.param({"type": "string", "format": "email"}, "expected date", id="format"),
        pytest.param({"type": "integer", "minimum": 3, "maximum": 2}, "no number is from 3 to 2", id="empty"),
        pytest.param({"type": "number", "minimum": 0.5}, "expected an integer", id="fraction"),
        pytest.param({"type": "text"}, "expected one of object", id="type"),
        pytest.param({"type": "string", "enum": [1]}, "another type", id="enum-of-another-type"),
        pytest.param({"minLength": 2, "minimum": 1}, "no type", id="no-type"),
        pytest.param({"type": "string", "pattern": "(?i)a"}, "#/pattern: flags", id="pattern"),
        pytest.param({"type": "string", "pattern": 3}, "#/pattern is no text", id="pattern-of-no-text"),
        pytest.param({"properties": ["a"]}, "#/properties is no object", id="properties"),
        pytest.param({"type": "array", "prefixItems": {"a": 1}}, "#/prefixItems is no list", id="prefix"),
        pytest.param({"type": "object", "required": 3}, "#/required is no list", id="required-of-no-list"),
        pytest.param({"type": "object", "$defs": [1], "$ref": "#/$defs/0"}, "'type'", id="beside-reference"),
    ],
)
def test_schemas_that_no_grammar_can_promise_are_refused(schema: Any, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        InferConfig(json_schema=schema)


def test_every_answer_is_one_of_the_choices(model: Model) -> None:
    choices = ("Yes", "No", 'Don\'t "know"', "No, but [see] below", "Weiß \\ nicht")
    texts = whole(model, Constraint("choices", choices))
    assert set(texts) <= set(choices)
    assert len(set(texts)) > 2


@pytest.mark.parametrize(
    "constraint",
    [
        pytest.param(Constraint("regex", r"[a-z]{3,9}( [a-z]{2,7})?"), id="regex"),
        pytest.param(
            Constraint(
                "json_schema", {"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}}}
            ),
            id="schema",
        ),
        pytest.param(Constraint("grammar", 'root ::= ("ab" | [c-z]{1,4} "!")+ "."'), id="grammar"),
    ],
)
def test_greedy_answers_are_those_of_llama_cpp_python(
    micro: Any, model: Model, constraint: Constraint
) -> None:
    import llama_cpp

    ours = answers(model, constraint, 24, temperature=0, texts=TEXTS[:5])
    llama = llama_cpp.Llama(str(micro.gguf), n_ctx=512, verbose=False)
    grammar = llama_cpp.LlamaGrammar.from_string(constraint.gbnf(), verbose=False)
    for text, answer in zip(TEXTS[:5], ours, strict=True):
        prompt = list(model.tokens(text))
        theirs = llama.create_completion(prompt, temperature=0, max_tokens=24, grammar=grammar)
        assert answer.text == theirs["choices"][0]["text"]
    llama.close()


def test_tokens_without_a_spelling_are_no_part_of_an_answer(model: Model) -> None:
    """``<unk>`` and ``<s>`` would fit by their names, but leave nothing in the text."""
    with closing(Grammar(model, "root ::= [a-z<>]*")) as grammar:
        state = grammar.start()
        permitted = state.permitted()
        assert [state.permits(token) for token in (0, 1, 2)] == [False, False, True] == list(permitted[:3])
        assert state.may_end()
        state.close()


def test_a_grammar_leaves_the_shares_of_what_it_permits_as_they_were(model: Model) -> None:
    """Refusing one token after the other draws from what remains, not from a distribution of its own."""
    prompt, letters = model.tokens(TEXTS[0]), "abcde"
    with Engine(model, Size(256, 256, False), 1) as engine:
        logits = engine.decode(run_of(prompt, 0, (0,), output_last=True))[0].astype(np.float64)
    spelled = [model.text([token]) for token in range(model.vocabulary)]
    weights = np.array([np.exp(logits[np.array(spelled) == letter]).sum() for letter in letters])
    found = answers(model, Constraint("grammar", "root ::= [a-e]"), 3, texts=TEXTS[:1] * 200)
    counts = np.array([sum(answer.text == letter for answer in found) for letter in letters])
    assert counts.sum() == 800
    assert counts / 800 == pytest.approx(weights / weights.sum(), abs=0.07)


def test_an_answer_that_cannot_go_on_says_so(model: Model) -> None:
    stuck = answers(model, Constraint("grammar", 'root ::= "a" [\\x00]'))
    assert {answer.error for answer in stuck} == {STUCK}
    endless = answers(model, Constraint("grammar", 'root ::= "a" root'), 8)
    assert {answer.error for answer in endless} == {CUT_OFF}
    open_end = answers(model, Constraint("grammar", "root ::= [a-w]*"), 8)
    assert {answer.error for answer in open_end} == {None}


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        pytest.param(
            {"grammar": 'root ::= "a" b'}, "grammar: .*Undefined rule identifier 'b'", id="undefined"
        ),
        pytest.param({"grammar": 'root ::= root "a"'}, "grammar: .*left recursion", id="left-recursion"),
        pytest.param({"grammar": 'root ::= "a'}, "grammar: .*unexpected end of input", id="malformed"),
        pytest.param({"grammar": 'start ::= "a"'}, "grammar: .*'root'", id="no-root"),
        pytest.param({"regex": "((a?){1000}){3}"}, "regex: .*number of rules", id="too-large"),
        pytest.param({"grammar": f"root ::= {'(' * 300_000}"}, r"grammar: .*crashes \(signal", id="deep"),
    ],
)
def test_what_llama_cpp_cannot_read_is_refused_before_a_model_is_loaded(settings: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        check(InferConfig(**settings))
    assert "\n" not in str(caught.value)


def test_what_llama_cpp_can_read_is_not_refused() -> None:
    list_of_many = {"type": "array", "items": SCHEMAS["many"], "maxItems": 100}
    for settings in ({}, {"regex": "a+"}, {"json_schema": list_of_many}, {"grammar": "root ::= <[5]>"}):
        check(InferConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        pytest.param({"regex": "a", "choices": ["a"]}, "regex and choices exclude each other", id="two"),
        pytest.param({"regex": "a", "stop": "x"}, "stop and regex exclude each other", id="stop"),
        pytest.param({"choices": ["a", "a"]}, "given twice", id="twice"),
        pytest.param({"choices": [True]}, "put yes and no in quotes", id="truth"),
        pytest.param({"choices": ["a "]}, "without space around", id="space"),
        pytest.param({"json_schema": "absent.json"}, "No such file", id="no-file"),
        pytest.param({"json_schema": "{"}, "no JSON", id="no-json"),
        pytest.param({"grammar": "absent.gbnf"}, "No such file", id="no-grammar-file"),
        pytest.param({"grammar": "root ::= [\0]"}, "holds a NUL", id="nul"),
        pytest.param({"n": 2}, "set temperature", id="alike"),
    ],
)
def test_settings_that_contradict_are_refused(settings: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        InferConfig(**settings)


def test_schemas_and_grammars_are_read_from_files(tmp_path: Any) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.gbnf"
    schema.write_text(json.dumps(SCHEMAS["text"]))
    grammar.write_text('root ::= "ä"\n')
    assert InferConfig(json_schema=str(schema)).json_schema == SCHEMAS["text"]
    assert InferConfig(json_schema=schema.read_text()) == InferConfig(json_schema=str(schema))
    assert InferConfig(json_schema={"properties": {1: {"const": 2}}}).json_schema["properties"] == {
        "1": {"const": 2}
    }
    assert InferConfig(grammar=str(grammar)).grammar == 'root ::= "ä"\n'


def test_the_stage_holds_its_answers_to_the_schema(
    micro: Any, dataset: Make, make_work: Make, labelled: Make
) -> None:
    schema = {"type": "object", "properties": {"code": {"enum": ["A", "B"]}}, "required": ["code"]}
    settings = {"json_schema": schema, "temperature": 1.5, "n": 2, "max_new_tokens": 60}
    work = make_work(micro.gguf.parent, dataset(labelled(8), (), "text"), **settings)
    predict(work)
    rows = pyarrow.parquet.read_table(work.output / "predictions.parquet").to_pylist()
    for answer in [one for row in rows for one in (row["label"], *row["samples"]) if one is not None]:
        assert json.loads(answer)["code"] in ("A", "B")
    assert all((row["error"] == CUT_OFF) == (row["label"] is None) for row in rows)
    assert json.loads((work.output / "run.json").read_text())["config"]["json_schema"] == schema


def test_a_grammar_that_fits_no_answer_is_an_error_that_names_the_reason(
    micro: Any, dataset: Make, make_work: Make
) -> None:
    data = dataset([("text", "data")], (), "text")
    with pytest.raises(BadDataError, match="none of the 1 rows can be predicted; the first: stuck"):
        predict(make_work(micro.gguf.parent, data, grammar="root ::= [\\x00]"))
    with pytest.raises(ConfigurationError, match="refuses the grammar"):
        predict(make_work(micro.gguf.parent, data, "other", grammar="root ::= <no such token>"))

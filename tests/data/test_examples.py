"""Each shape of row becomes a prompt and a completion; a row that does not fit is named."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from tunemill.data.config import PrepareConfig
from tunemill.data.examples import Example, Examples, label_values, read_examples, recognise
from tunemill.data.labels import NO_LABELS, label_set
from tunemill.data.tables import Row
from tunemill.data.template import fill
from tunemill.errors import BadDataError

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}


def read(*values: dict[str, Any], **config: Any) -> Examples:
    settings = PrepareConfig(dataset_name="rows.jsonl", **config)
    rows = [Row(f"row {number}", f"rows-{number}", one) for number, one in enumerate(values, 1)]
    shape = recognise(rows, settings)
    labels = label_set(settings, label_values(rows, shape, settings)) if shape.labelled else NO_LABELS
    return read_examples(rows, shape, labels, settings)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"messages": [USER, {"role": "assistant", "content": "Hello"}]}, id="messages"),
        pytest.param(
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            id="sharegpt",
        ),
        pytest.param({"prompt": "Hi", "completion": "Hello"}, id="prompt and completion"),
        pytest.param(
            {"prompt": [USER], "completion": [{"role": "assistant", "content": "Hello"}]},
            id="conversational prompt and completion",
        ),
        pytest.param({"instruction": "Hi", "input": "", "output": "Hello"}, id="alpaca"),
        pytest.param({"instruction": "Hi", "instances": [{"input": "", "output": "Hello"}]}, id="seed tasks"),
        pytest.param({"question": "Hi", "answer": "Hello"}, id="columns"),
    ],
)
def test_every_shape_is_recognised(row: dict[str, Any]) -> None:
    (example,) = read(row, system_prompt="Be brief.")
    assert example.prompt == (SYSTEM, USER)
    assert example.completion == "Hello"
    assert example.text == "Hi"
    assert example.label is None
    assert example.id == "rows-1"


def test_alpaca_puts_the_input_below_the_instruction() -> None:
    (example,) = read({"instruction": "Add.", "input": "1 + 1", "output": "2", "id": 7})
    assert example.prompt == ({"role": "user", "content": "Add.\n\n1 + 1"},)
    assert example.id == "7"


def test_several_instances_are_several_examples() -> None:
    instances = [{"input": "1", "output": "one"}, {"input": "2", "output": "two"}]
    examples = read({"id": "seed", "instruction": "Spell.", "instances": instances})
    assert [(one.id, one.completion) for one in examples] == [("seed-1", "one"), ("seed-2", "two")]


def test_a_conversation_is_learnt_up_to_its_last_answer() -> None:
    turns = [SYSTEM, USER, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]
    (example,) = read({"messages": [*turns, {"role": "assistant", "content": "See you"}]}, system_prompt="x")
    assert list(example.prompt) == turns
    assert (example.text, example.completion) == ("Hi\n\nBye", "See you")


def test_text_and_label_fill_the_tasks_prompt() -> None:
    examples = read(
        {"code": 4.0, "subject": "Milk {labels}", "text": "On {subject}."},
        {"code": "12", "subject": "Theft", "text": "A {{thief}}."},
        label_column="code",
        labels={"4": "Farming", "12": "Law, crime"},
        prompt="{{One}} of {labels}: {subject}\n{text}",
    )
    assert [one.prompt[0]["content"] for one in examples] == [
        "{One} of Farming; Law, crime: Milk {labels}\nOn {subject}.",
        "{One} of Farming; Law, crime: Theft\nA {{thief}}.",
    ]
    assert [(one.label, one.completion) for one in examples] == [
        ("Farming", "Farming"),
        ("Law, crime", "Law, crime"),
    ]
    assert examples[0].text == "On {subject}."


def test_labels_are_found_in_the_data() -> None:
    examples = read({"text": "x", "label": 1}, {"text": "y", "label": 0})
    assert [one.label for one in examples] == ["1", "0"]


@pytest.mark.parametrize(
    ("rows", "config", "words"),
    [
        pytest.param(
            [{"text": "x", "label": "farm"}, {"text": "y", "label": "Farmin"}, {"text": "z", "label": "q"}],
            {"labels": ["farm", "Farming"]},
            ["row 2", "'Farmin'", "nearest is 'Farming'", "1 more"],
            id="label outside the set",
        ),
        pytest.param(
            [{"text": "x", "label": "a"}, {"text": "y"}],
            {"labels": ["a", "b"]},
            ["row 2", "'label'"],
            id="no label",
        ),
        pytest.param(
            [{"text": "x", "label": "a"}, {"text": "y", "label": " "}],
            {"labels": ["a", "b"]},
            ["row 2", "no label"],
            id="blank label",
        ),
        pytest.param(
            [{"text": "x", "label": "a"}, {"text": "y", "label": ["a", "b"]}],
            {"labels": ["a", "b"]},
            ["row 2", "list as its label"],
            id="several labels",
        ),
        pytest.param(
            [{"text": "x", "label": "a"}, {"text": None, "label": "b"}], {}, ["row 2", "'text'"], id="no text"
        ),
        pytest.param(
            [{"text": "x", "label": "a"}, {"text": "y", "label": "a"}], {}, ["1 label"], id="one label only"
        ),
        pytest.param(
            [{"text": "x", "label": "a"}], {"label_column": "labl"}, ["'labl'", "'label'"], id="wrong column"
        ),
        pytest.param(
            [{"text": "x", "label": "a"}],
            {"labels": ["a", "a"]},
            ["label set"],
            id="a label twice in the set",
        ),
        pytest.param(
            [{"text": "x", "label": "a"}],
            {"labels": {"1": "a", "a": "b"}},
            ["'a'"],
            id="code is another's name",
        ),
        pytest.param(
            [{"text": "x", "label": "a"}],
            {"labels": ["a", "b"], "prompt": "{subjct} {text}"},
            ["row 1", "'subjct'"],
            id="unknown column in the prompt",
        ),
        pytest.param([{"foo": 1, "bar": 2}], {}, ["bar, foo", "text_column"], id="no known shape"),
        pytest.param([{"messages": [USER]}], {}, ["row 1", "assistant"], id="no answer"),
        pytest.param(
            [{"messages": [{"role": "robot", "content": "x"}]}], {}, ["row 1", "'role'"], id="unknown role"
        ),
        pytest.param(
            [{"question": "a\ud800", "answer": "b"}], {}, ["row 1", "surrogate"], id="half a character"
        ),
        pytest.param([{"messages": [USER, None]}], {}, ["row 1"], id="turn is null"),
        pytest.param(
            [{"instruction": "a", "output": "b"}, {"instruction": "a"}],
            {},
            ["row 2", "'output'"],
            id="alpaca",
        ),
        pytest.param([{"instruction": "a", "instances": []}], {}, ["row 1", "instances"], id="no instances"),
        pytest.param(
            [{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}],
            {},
            ["row 2", "'prompt'"],
            id="null prompt",
        ),
        pytest.param(
            [{"text": {"a": 1}, "label": "a"}, {"text": "x", "label": "b"}],
            {},
            ["row 1", "dict"],
            id="no text",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    rows: list[dict[str, Any]], config: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(BadDataError) as error:
        read(*rows, **config)
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_codes_of_yaml_are_numbers_and_its_truth_values_are_refused() -> None:
    config = PrepareConfig(dataset_name="x", labels={1: "Health", 2: "Law"})  # type: ignore[dict-item]
    assert config.labels == {"1": "Health", "2": "Law"}
    with pytest.raises(ValueError, match="in quotes"):
        PrepareConfig(dataset_name="x", labels=[True, False])  # type: ignore[arg-type]


def test_json_in_a_prompt_is_left_alone() -> None:
    assert fill('Answer as {"label": 1}: {text}', {"text": "x"}, "row 1") == 'Answer as {"label": 1}: x'


def test_examples_are_made_anew_of_their_rows() -> None:
    examples = read(*({"question": f"{n}?", "answer": "Yes"} for n in range(5)))
    assert [example.text for example in examples] == ["0?", "1?", "2?", "3?", "4?"]
    assert (examples[3], examples[-1].text) == (examples[3], "4?")
    assert [example.text for example in examples[1:3]] == ["1?", "2?"]
    assert [example.text for example in examples.select([4, 0]).select([1])] == ["0?"]
    with pytest.raises(IndexError):
        examples[5]


def test_going_through_examples_reads_each_row_once() -> None:
    rows = [Row(f"row {n}", f"rows-{n}", {}) for n in range(3)]
    calls: list[str] = []

    def of(row: Row) -> list[Example]:
        calls.append(row.name)
        return [Example(f"{row.name}-{n}", (), "", "", None, row.where, None) for n in range(2)]

    examples = Examples(rows, of, array("i", [0, 0, 0, 1, 2, 1]))
    assert [example.id for example in examples] == ["rows-0-0", "rows-0-1", "rows-2-1"]
    assert calls == ["rows-0", "rows-2"]

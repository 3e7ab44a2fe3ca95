"""Turns a row of any known shape into one example: prompt messages, completion, text, label.

The shape is recognised once, from the columns of the whole dataset and the task's
configuration; every row is then held to it, and one that does not fit is named. Values are put
into the prompt as they are, once: braces in a text are never taken for columns. Examples are made
of their row whenever they are asked for and not kept: 30,000 texts on 46 dimensions would take 7 GB.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, overload

from tunemill.data.config import PrepareConfig
from tunemill.data.formats import first_values
from tunemill.data.labels import LabelSet, label_text, parts
from tunemill.data.tables import Row
from tunemill.data.template import DESCRIPTION, DIMENSION, LABELS, fill
from tunemill.errors import BadDataError

Message = dict[str, str]

TEXT_COLUMNS = ("text", "sentence", "content", "document", "body", "question")
LABEL_COLUMNS = ("label", "labels", "category", "class", "code", "topic")
ANSWER_COLUMNS = ("completion", "output", "answer", "response")
ID_COLUMNS = ("id", "uid", "idx")
ROLES = {
    "system": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip
"""Who speaks, in the words of chat and ShareGPT files, to the role templates know."""

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Example:
    """One prompt with its gold completion."""

    id: str
    prompt: tuple[Message, ...]
    completion: str
    text: str
    """What the example is about, without instructions; duplicates are found by it."""
    label: str | None
    """The name; of several, all of them joined."""
    where: str
    """The row it came from, for people."""
    split: str | None
    """The split the source gave it, if any."""
    belongs: str | None = None
    """What it must not be split apart from: the value of ``group_column``."""
    item: str | None = None
    """The text's own id, where the example asks about one dimension of it."""
    dimension: str | None = None
    labels: tuple[str, ...] | None = None
    """Names, where there may be several."""

    @property
    def unrated(self) -> bool:
        """Whether the data say nothing of this text in this dimension."""
        return self.dimension is not None and self.label is None


class Examples(Sequence[Example]):
    """Examples of a dataset's rows, each made anew when it is asked for; in order, a row is read once.

    What is kept of one is its place, 8 bytes: the row's number and its own among those of the row.
    """

    def __init__(
        self, rows: Sequence[Row], read: Callable[[Row], Sequence[Example]], places: array[int]
    ) -> None:
        self._rows = rows
        self._read = read
        self._places = places
        self._newest: tuple[int, Sequence[Example]] = (-1, ())

    def __len__(self) -> int:
        return len(self._places) // 2

    @overload
    def __getitem__(self, position: int) -> Example: ...
    @overload
    def __getitem__(self, position: slice) -> Examples: ...
    def __getitem__(self, position: int | slice) -> Example | Examples:
        if isinstance(position, slice):
            return self.select(range(len(self))[position])
        start = range(0, len(self._places), 2)[position]
        row, number = self._places[start : start + 2]
        if self._newest[0] != row:
            self._newest = (row, self._read(self._rows[row]))
        return self._newest[1][number]

    def select(self, positions: Iterable[int]) -> Examples:
        """Return the examples at these positions, in this order."""
        places = array("i")
        for position in positions:
            places.extend(self._places[2 * position : 2 * position + 2])
        return Examples(self._rows, self._read, places)


@dataclass(frozen=True)
class Shape:
    """How the rows of one dataset are read."""

    name: str
    """messages, sharegpt, prompt-completion, alpaca, seed-tasks, text-label, text-labels, dimensions or
    columns."""
    text: str | None = None
    answer: str | None = None
    """Column of the label, of the labels, or of the free answer."""

    @property
    def labelled(self) -> bool:
        """Whether answers are of a set."""
        return self.name in ("text-label", "text-labels", "dimensions")


def recognise(rows: Sequence[Row], config: PrepareConfig) -> Shape:
    """Find the shape of a dataset's rows.

    Raises:
        BadDataError: a configured column is absent, or no known shape fits.
    """
    columns = first_values(rows)
    for key in ("text_column", "label_column", "completion_column", "id_column", "group_column"):
        if (column := getattr(config, key)) is not None:
            _need_column(column, columns, key)
    if config.dimensions is not None:
        return _dimensions(columns, config)
    if config.label_column or config.completion_column:
        return _columns(columns, config)
    if isinstance(columns.get("messages"), list):
        return Shape("messages")
    if isinstance(columns.get("conversations"), list):
        return Shape("sharegpt")
    if "instances" in columns and "instruction" in columns:
        return Shape("seed-tasks")
    if config.labels is None and "prompt" in columns and "completion" in columns:
        return Shape("prompt-completion")
    if config.labels is None and "instruction" in columns and "output" in columns:
        return Shape("alpaca")
    return _columns(columns, config)


def _columns(columns: Mapping[str, Any], config: PrepareConfig) -> Shape:
    text = config.text_column or _first(TEXT_COLUMNS, columns)
    label = config.label_column or (None if config.completion_column else _first(LABEL_COLUMNS, columns))
    if label is not None and (text is not None or config.prompt is not None):
        return Shape("text-labels" if config.max_labels else "text-label", text, label)
    answer = config.completion_column or _first(ANSWER_COLUMNS, columns)
    if config.labels is None and answer is not None and (text is not None or config.prompt is not None):
        return Shape("columns", text, answer)
    raise BadDataError(
        f"{config.dataset_name} has the columns {', '.join(sorted(columns)) or 'of no row'}, "
        "which is no known shape: set text_column and label_column (or completion_column)"
    )


def _dimensions(columns: Mapping[str, Any], config: PrepareConfig) -> Shape:
    for dimension in config.dimensions or ():
        _need_column(dimension, columns, "dimensions")
    text = config.text_column or _first(TEXT_COLUMNS, columns)
    if text is None:
        raise BadDataError(f"{config.dataset_name} has no column of texts: set text_column")
    return Shape("dimensions", text)


def read_examples(rows: Sequence[Row], shape: Shape, labels: LabelSet, config: PrepareConfig) -> Examples:
    """Read every row by the dataset's shape.

    Raises:
        BadDataError: rows lack a field or have a label outside the set; names the first one.
    """
    reader = READERS[shape.name]
    places = array("i")
    errors: list[BadDataError] = []
    for place, row in enumerate(rows):
        try:
            for number in range(len(reader(row, shape, labels, config))):
                places.extend((place, number))
        except BadDataError as error:
            errors.append(error)
    if errors:
        more = f" ({len(errors) - 1} more rows are wrong as well)" if len(errors) > 1 else ""
        raise BadDataError(f"{errors[0]}{more}")
    return Examples(rows, lambda row: reader(row, shape, labels, config), places)


def label_values(rows: Iterable[Row], shape: Shape, config: PrepareConfig) -> list[str]:
    """Return every label that a row has, as text."""
    columns = list(config.dimensions or ()) or [shape.answer or ""]
    values = [value for row in rows for column in columns if not _missing(value := row.values.get(column))]
    if shape.name == "text-labels":
        values = [part for value in values for part in parts(value, config.label_separator)]
    return [label_text(value) for value in values]


def described(config: PrepareConfig) -> list[tuple[str, str]]:
    """Return every dimension with what ``{description}`` says of it; its name where nothing is given."""
    given = config.dimensions or ()
    return list(given.items()) if isinstance(given, Mapping) else [(name, name) for name in given]


def _from_columns(row: Row, shape: Shape, labels: LabelSet, config: PrepareConfig) -> list[Example]:
    text, content = _asked(row, shape, labels, config, {})
    completion = _text(row, shape.answer or "") if row.answered else ""
    return [_example(row, [_user(content)], completion, text, None, config)]


def _from_label(row: Row, shape: Shape, labels: LabelSet, config: PrepareConfig) -> list[Example]:
    label = labels.name_of(_field(row, shape.answer or ""), row.where) if row.answered else None
    text, content = _asked(row, shape, labels, config, {})
    return [_example(row, [_user(content)], label or "", text, label, config)]


def _from_labels(row: Row, shape: Shape, labels: LabelSet, config: PrepareConfig) -> list[Example]:
    text, content = _asked(row, shape, labels, config, {})
    if not row.answered:
        return [_example(row, [_user(content)], "", text, None, config)]
    cell, separator = _field(row, shape.answer or ""), config.label_separator
    names = labels.names_of(cell, separator, config.max_labels or 1, row.where)
    joined = separator.join(names)
    return [replace(_example(row, [_user(content)], joined, text, joined, config), labels=names)]


def _from_dimensions(row: Row, shape: Shape, labels: LabelSet, config: PrepareConfig) -> list[Example]:
    """Ask about every dimension; one that the row says nothing about has no label and no completion."""
    examples = []
    for dimension, description in described(config):
        level = row.values.get(dimension) if row.answered else None
        label = None if _missing(level) else labels.name_of(level, f"{row.where}, {dimension!r},")
        given = {DIMENSION: dimension, DESCRIPTION: description}
        text, content = _asked(row, shape, labels, config, given)
        whole = _example(row, [_user(content)], label or "", text, label, config)
        examples.append(replace(whole, id=f"{whole.id}/{dimension}", item=whole.id, dimension=dimension))
    return examples


def _missing(value: Any) -> bool:
    """Tell a cell without a level: null, blank, or the number that spreadsheets' readers make of it."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _asked(
    row: Row, shape: Shape, labels: LabelSet, config: PrepareConfig, given: Mapping[str, str]
) -> tuple[str, str]:
    """Return what the row is about, and the user's message."""
    text = _text(row, shape.text) if shape.text else ""
    if config.prompt is None:
        return text, text
    own = {"text": text} if shape.text else {}
    content = fill(config.prompt, {**row.values, **own, LABELS: labels.listed(), **given}, row.where)
    return text if shape.text else content, content


def _from_messages(row: Row, shape: Shape, labels: LabelSet, config: PrepareConfig) -> list[Example]:
    return _conversation(row, _field(row, "messages"), "role", "content", config)


def _from_sharegpt(row: Row, shape: Shape, labels: LabelSet, config: PrepareConfig) -> list[Example]:
    return _conversation(row, _field(row, "conversations"), "from", "value", config)


def _conversation(row: Row, turns: Any, role: str, content: str, config: PrepareConfig) -> list[Example]:
    messages = _messages(row, turns, role, content)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise BadDataError(f"{row.where} does not end with an answer of the assistant")
    text = "\n\n".join(message["content"] for message in messages if message["role"] == "user")
    return [_example(row, messages[:-1], messages[-1]["content"], text, None, config)]


def _messages(row: Row, turns: Any, role: str, content: str) -> list[Message]:
    messages: list[Message] = []
    for turn in turns if isinstance(turns, list) else [None]:
        values = turn if isinstance(turn, dict) else {}
        speaker, said = ROLES.get(str(values.get(role))), values.get(content)
        if speaker is None or not isinstance(said, str):
            raise BadDataError(f"{row.where} has a turn without a known {role!r} and a text {content!r}")
        messages.append({"role": speaker, "content": said})
    return messages


def _from_prompt_completion(row: Row, shape: Shape, labels: LabelSet, config: PrepareConfig) -> list[Example]:
    prompt, completion = _field(row, "prompt"), _field(row, "completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        asked = prompt if isinstance(prompt, list) else [_user(label_text(prompt))]
        said = {"role": "assistant", "content": completion}
        answer = completion if isinstance(completion, list) else [said]
        return _conversation(row, [*asked, *answer], "role", "content", config)
    text = label_text(prompt)
    content = fill(config.prompt, row.values, row.where) if config.prompt else text
    return [_example(row, [_user(content)], label_text(completion), text, None, config)]


def _from_alpaca(row: Row, shape: Shape, labels: LabelSet, config: PrepareConfig) -> list[Example]:
    return [_instructed(row, row.values, row.name, config)]


def _from_seed_tasks(row: Row, shape: Shape, labels: LabelSet, config: PrepareConfig) -> list[Example]:
    instances = _field(row, "instances")
    if not isinstance(instances, list) or not instances:
        raise BadDataError(f"{row.where} has no list of instances")
    name = _identifier(row, config)
    several = len(instances) > 1
    examples = []
    for number, instance in enumerate(instances, 1):
        if not isinstance(instance, dict):
            raise BadDataError(f"{row.where} has an instance that is no object")
        values = {**row.values, **instance, "id": f"{name}-{number}" if several else name}
        examples.append(_instructed(row, values, name, config))
    return examples


def _instructed(row: Row, values: Mapping[str, Any], name: str, config: PrepareConfig) -> Example:
    row = Row(row.where, name, values, row.split)
    instruction, output = _text(row, "instruction"), _text(row, "output")
    extra = values.get("input")
    extra = "" if extra is None else label_text(extra)
    text = f"{instruction}\n\n{extra}".strip()
    content = fill(config.prompt, {**values, "input": extra}, row.where) if config.prompt else text
    return _example(row, [_user(content)], output, text, None, config)


def _example(
    row: Row, messages: list[Message], completion: str, text: str, label: str | None, config: PrepareConfig
) -> Example:
    if config.system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    belongs = _text(row, config.group_column) if config.group_column else None
    for said in [completion, *(message["content"] for message in messages)]:
        if _SURROGATE.search(said):
            raise BadDataError(f"{row.where} has half a character (a lone surrogate): repair or remove it")
    name = _identifier(row, config)
    return Example(name, tuple(messages), completion.strip(), text, label, row.where, row.split, belongs)


def _identifier(row: Row, config: PrepareConfig) -> str:
    if config.id_column:
        return _text(row, config.id_column)
    value = next((row.values[name] for name in ID_COLUMNS if row.values.get(name) not in (None, "")), None)
    return row.name if value is None else label_text(value)


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _field(row: Row, column: str) -> Any:
    value = row.values.get(column)
    if value is None:
        raise BadDataError(f"{row.where} has no {column!r}: give it one or remove the row")
    return value


def _text(row: Row, column: str) -> str:
    value = _field(row, column)
    if isinstance(value, dict | list):
        raise BadDataError(f"{row.where} has a {type(value).__name__} as {column!r}, expected a text")
    return label_text(value)


def _need_column(column: str, columns: Mapping[str, Any], key: str) -> None:
    if column not in columns:
        near = get_close_matches(column, list(columns), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(columns))}"
        raise BadDataError(f"no row has the column {column!r} that {key} names: {hint}")


def _first(names: Sequence[str], columns: Mapping[str, Any]) -> str | None:
    return next((name for name in names if name in columns), None)


Reader = Callable[[Row, Shape, LabelSet, PrepareConfig], list[Example]]

READERS: dict[str, Reader] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "prompt-completion": _from_prompt_completion,
    "alpaca": _from_alpaca,
    "seed-tasks": _from_seed_tasks,
    "text-label": _from_label,
    "text-labels": _from_labels,
    "dimensions": _from_dimensions,
    "columns": _from_columns,
}

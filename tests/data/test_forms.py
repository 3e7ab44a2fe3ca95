"""Several labels of one text, and texts rated on dimensions: what prepare makes of them, and refuses."""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from pydantic import ValidationError

from tunemill.data.config import PrepareConfig
from tunemill.data.prepare import reads
from tunemill.data.template import order
from tunemill.errors import BadDataError
from tunemill.recipe import Choice, resolve
from tunemill.stages import known_keys
from tunemill.task import read_task
from tunemill.work import Facts

Prepared = Callable[..., tuple[Path, Facts]]
SUBJECTS = {"1": "Law", "2": "Physics", "3": "Medicine, Health"}
MOODS = {"joy": "how glad the writer is", "hope": "what the writer expects", "calm": "how at rest"}
LEVELS = ["low", "medium", "high"]
RATED: dict[str, Any] = {
    "labels": LEVELS, "ordered": True, "dimensions": MOODS,
    "prompt": "Rate it as {labels}.\n\nText: {text}\n\nRate {dimension}: {description}",
}  # fmt: skip


def several(number: int = 40) -> list[dict[str, Any]]:
    """Texts of one to three subjects, by name, by code and as lists."""
    cells: list[Any] = ["Law", "2; Law", ["Physics", "Law"], "Medicine, Health;Law ; Physics"]
    return [{"text": f"study {n} of thing {n * 7919 % 1000}", "labels": cells[n % 4]} for n in range(number)]


def rated(number: int = 30) -> list[dict[str, Any]]:
    """Wide rows; every fourth says nothing of calm."""
    return [
        {
            "id": f"t{n}", "text": f"message {n} about {n * 7919 % 1000} things", "author": f"a{n // 2}",
            "joy": LEVELS[n % 3], "hope": LEVELS[n // 3 % 3], "calm": None if n % 4 == 0 else "low",
        }
        for n in range(number)
    ]  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[dict[str, Any]]], str]:
    def write(content: list[dict[str, Any]]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in content))
        return str(path)

    return write


def read(output: Path) -> list[dict[str, Any]]:
    return [
        {**row, "split": path.stem}
        for path in sorted(output.glob("*.parquet"))
        for row in parquet.read_table(path).to_pylist()
    ]


class TestSeveralLabels:
    def test_lists_codes_and_joined_names_become_one_answer(
        self, prepared: Prepared, write: Callable[..., str]
    ) -> None:
        output, facts = prepared(dataset_name=write(several()), labels=SUBJECTS, max_labels=3)
        found = {row["id"]: row for row in read(output)}
        answers = [found[f"rows-{n}"] for n in range(1, 5)]
        assert [row["labels"] for row in answers] == [
            ["Law"], ["Physics", "Law"], ["Physics", "Law"], ["Medicine, Health", "Law", "Physics"],
        ]  # fmt: skip
        assert [row["completion"] for row in answers[2:]] == [
            "Physics; Law",
            "Medicine, Health; Law; Physics",
        ]
        assert all(row["label"] == row["completion"] for row in found.values())
        assert facts["form"] == "labels"
        task = read_task(output)
        assert (task.form, task.max_labels, task.separator) == ("labels", 3, "; ")
        card = json.loads((output / "card.json").read_text())
        assert {name: sum(counts.values()) for name, counts in card["labels"].items()} == {
            "Law": 40, "Physics": 30, "Medicine, Health": 10,
        }  # fmt: skip

    def test_a_saved_dataset_has_lists_of_numbers(self, prepared: Prepared, tmp_path: Path) -> None:
        from datasets import ClassLabel, Dataset, Features, List, Value

        features = Features({"text": Value("string"), "labels": List(ClassLabel(names=["calm", "joy"]))})
        columns = {"text": [f"number {n} of it" for n in range(9)], "labels": [[1], [1, 0], [0]] * 3}
        Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "saved"))
        output, _ = prepared(dataset_name=str(tmp_path / "saved"), max_labels=2)
        assert Counter(row["completion"] for row in read(output)) == {"joy": 3, "joy; calm": 3, "calm": 3}

    def test_labels_are_found_in_the_data(self, prepared: Prepared, write: Callable[..., str]) -> None:
        rows = [{"text": f"number {n}", "labels": "b|a" if n % 2 else "c"} for n in range(20)]
        output, _ = prepared(dataset_name=write(rows), max_labels=2, label_separator="|")
        assert read_task(output).labels == ("a", "b", "c")

    def test_the_rarest_label_is_held_out_too(self, prepared: Prepared, write: Callable[..., str]) -> None:
        rare = [{"text": f"odd {n} one", "labels": f"Law; R{n % 2}"} for n in range(8)]
        rows = [row for row in several(36) if row["labels"] != "2; Law"] + rare
        labels = [*SUBJECTS.values(), "R0", "R1"]
        output, _ = prepared(dataset_name=write(rows), labels=labels, max_labels=3)
        held = Counter(name for row in read(output) if row["split"] == "test" for name in row["labels"])
        assert held["R0"] == held["R1"] == 1

    @pytest.mark.parametrize(
        ("cell", "config", "words"),
        [
            pytest.param(
                "Law; Phsics", {}, "line 41 has the label 'Phsics'.*nearest is 'Physics'", id="label"
            ),
            pytest.param("Law; 2; 3", {"max_labels": 2}, "has 3 labels, at most 2", id="too many"),
            pytest.param(" ; ", {}, "line 41 has no label", id="none"),
            pytest.param([], {}, "line 41 has no label", id="empty list"),
            pytest.param(
                "Law", {"label_separator": ","}, "'Medicine, Health' holds the separator", id="comma"
            ),
            pytest.param("Law", {"max_labels": 4}, "max_labels=4 is more than the 3 labels", id="max_labels"),
        ],
    )
    def test_what_does_not_fit_is_named(
        self, prepared: Prepared, write: Callable[..., str], cell: Any, config: dict[str, Any], words: str
    ) -> None:
        rows = [*several(), {"text": "the last", "labels": cell}]
        with pytest.raises(BadDataError, match=words) as error:
            prepared(dataset_name=write(rows), **{"labels": SUBJECTS, "max_labels": 3, **config})
        assert "\n" not in str(error.value)


class TestDimensions:
    def test_every_text_is_asked_about_each(self, prepared: Prepared, write: Callable[..., str]) -> None:
        output, facts = prepared(dataset_name=write(rated()), **RATED)
        rows = read(output)
        assert facts["dropped"]["unrated"] == 8
        assert sum(facts["rows"].values()) == 30 * 3 - 8
        one = next(row for row in rows if row["id"] == "t7/hope")
        assert (one["item"], one["dimension"], one["label"], one["completion"]) == (
            "t7",
            "hope",
            "high",
            "high",
        )
        assert one["prompt"][0]["content"].endswith("Rate hope: what the writer expects")
        assert not any(row["id"] == "t4/calm" for row in rows)
        task = read_task(output)
        assert (task.form, task.labels, task.ordered) == ("label", tuple(LEVELS), True)
        assert task.dimensions == tuple(MOODS)

    def test_a_texts_rows_stay_together_and_beside_each_other(
        self, prepared: Prepared, write: Callable[..., str]
    ) -> None:
        output, _ = prepared(dataset_name=write(rated()), group_column="author", **RATED)
        splits = defaultdict(set)
        items: dict[str, list[str]] = defaultdict(list)
        for row in read(output):
            splits[f"a{int(row['item'][1:]) // 2}"].add(row["split"])
            items[row["split"]].append(row["item"])
        assert all(len(found) == 1 for found in splits.values())
        for listed in items.values():
            assert listed == sorted(listed, key=lambda item: int(item[1:]))

    def test_the_card_counts_each_dimension(self, prepared: Prepared, write: Callable[..., str]) -> None:
        output, _ = prepared(dataset_name=write(rated()), **RATED)
        card = json.loads((output / "card.json").read_text())
        counts = {name: sum(split.values()) for name, split in card["dimensions"]["calm"].items()}
        assert counts == {"low": 22, "medium": 0, "high": 0}
        assert card["contradictory_texts"] == 0
        assert "| calm | 22 | 0 | 0 |" in (output / "README.md").read_text()

    def test_equal_texts_rated_differently_are_reported(
        self, prepared: Prepared, write: Callable[..., str]
    ) -> None:
        again = {**rated(9)[8], "id": "again", "joy": "low"}
        output, facts = prepared(dataset_name=write([*rated(), again]), **RATED)
        card = json.loads((output / "card.json").read_text())
        assert card["contradictory_ids"] == [["t8/joy", "again/joy"]]
        assert facts["dropped"]["duplicate"] == 1  # of hope; calm is not rated

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            pytest.param({"joy": "hihg"}, "line 31, 'joy', has the label 'hihg'.*'high'", id="level"),
            pytest.param({"joy": ["high"]}, "line 31, 'joy', has a list", id="list"),
        ],
    )
    def test_a_wrong_level_is_named(
        self, prepared: Prepared, write: Callable[..., str], change: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(BadDataError, match=words):
            prepared(dataset_name=write([*rated(), {**rated(1)[0], "id": "x", **change}]), **RATED)

    def test_a_blank_text_is_left_out_though_its_prompt_is_not_blank(
        self, prepared: Prepared, write: Callable[..., str]
    ) -> None:
        _, facts = prepared(dataset_name=write([*rated(), {**rated(1)[0], "id": "x", "text": " "}]), **RATED)
        assert facts["dropped"]["blank"] == 2

    def test_an_absent_column_is_named(self, prepared: Prepared, write: Callable[..., str]) -> None:
        with pytest.raises(BadDataError, match=r"column 'hop' that dimensions names: did you mean 'hope'"):
            prepared(dataset_name=write(rated()), **{**RATED, "dimensions": ["joy", "hop"]})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param({"ordered": True}, "ordered needs labels", id="ordered"),
        pytest.param({"label_separator": "  "}, "label_separator is blank", id="separator"),
        pytest.param({"dimensions": ["a"], "prompt": "{text}"}, "need a prompt with", id="prompt"),
        pytest.param({"dimensions": ["a", "a"], "prompt": "{dimension}"}, "names one twice", id="twice"),
        pytest.param({"dimensions": ["a"], "max_labels": 2, "prompt": "{dimension}"}, "leave out", id="both"),
        pytest.param({"completion_column": "a", "max_labels": 2}, "exclude each other", id="free"),
        pytest.param({"labels": ["a", "b"], "answer_kind": "numbers-and-spans"}, "free answers", id="kind"),
    ],
)
def test_settings_that_contradict_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PrepareConfig(dataset_name="x.csv", **config)


def test_numbers_and_spans_reach_the_task(prepared: Prepared, write: Callable[..., str]) -> None:
    rows = [{"question": f"What is {n} plus {n}?", "answer": f"{2 * n} million"} for n in range(10)]
    output, _ = prepared(dataset_name=write(rows), answer_kind="numbers-and-spans")
    assert read_task(output).answer_kind == "numbers-and-spans"


def test_prompts_about_nothing_keep_all_but_the_content(
    prepared: Prepared, write: Callable[..., str]
) -> None:
    output, _ = prepared(dataset_name=write(rated()), **RATED)
    asked = json.loads((output / "content_free.json").read_text())
    assert Counter(one["dimension"] for one in asked) == dict.fromkeys(MOODS, 3)
    assert [one["prompt"][0]["content"] for one in asked if one["dimension"] == "hope"] == [
        f"Rate it as low, medium, high.\n\nText: {said}\n\nRate hope: what the writer expects"
        for said in ("N/A", "[MASK]", "")
    ]


class TestUnlabelled:
    @pytest.mark.parametrize(
        ("rows", "config", "asked"),
        [
            pytest.param(rated(), {"label_column": "joy", "labels": LEVELS}, 2, id="label"),
            pytest.param(several(), {"labels": SUBJECTS, "max_labels": 3}, 2, id="labels"),
            pytest.param(rated(), RATED, 6, id="dimensions"),
            pytest.param(
                [{"text": f"{n}?", "answer": f"{n}!"} for n in range(9)],
                {"completion_column": "answer"},
                2,
                id="text",
            ),
        ],
    )
    def test_texts_without_answers_are_only_to_be_predicted(
        self,
        prepared: Prepared,
        write: Callable[..., str],
        tmp_path: Path,
        rows: list[dict[str, Any]],
        config: dict[str, Any],
        asked: int,
    ) -> None:
        new = tmp_path / "new.csv"
        new.write_text("id,text\nn1,message 1 about 919 things\nn2,\n")
        output, facts = prepared(dataset_name=write(rows), unlabelled_files=[str(new)], **config)
        found = parquet.read_table(output / "unlabelled.parquet").to_pylist()
        assert facts["unlabelled"] == len(found) == asked
        assert {row.get("item") or row["id"] for row in found} == {"n1", "n2"}
        assert all(row["label"] is None and row["completion"] == "" for row in found)
        assert "message 1 about 919 things" in found[0]["prompt"][0]["content"]
        assert {row["text"] for row in found} == {"message 1 about 919 things", ""}
        without, same = prepared("without", dataset_name=write(rows), **config)
        assert same["rows"] == facts["rows"]
        for name in ("train.parquet", "test.parquet"):
            assert (output / name).read_bytes() == (without / name).read_bytes()

    def test_their_files_decide_what_is_prepared(self, write: Callable[..., str], tmp_path: Path) -> None:
        new = tmp_path / "new.csv"
        new.write_text("text\none\n")
        config = PrepareConfig(dataset_name=write(rated()), unlabelled_files=(str(new),))
        before = reads(config)
        new.write_text("text\ntwo\n")
        assert reads(config) != before

    def test_two_with_one_id_are_named(
        self, prepared: Prepared, write: Callable[..., str], tmp_path: Path
    ) -> None:
        (tmp_path / "new.csv").write_text("id,text\nn1,a\nn1,b\n")
        with pytest.raises(BadDataError, match=r"new.csv row 1 and new.csv row 2 have the same id 'n1/joy'"):
            prepared(dataset_name=write(rated()), unlabelled_files=[str(tmp_path / "new.csv")], **RATED)

    def test_conversations_have_no_texts_without_answers(
        self, prepared: Prepared, write: Callable[..., str], tmp_path: Path
    ) -> None:
        (tmp_path / "new.csv").write_text("prompt\na\n")
        rows = [{"prompt": f"{n}?", "completion": f"{n}!"} for n in range(9)]
        with pytest.raises(BadDataError, match="read as prompt-completion: set text_column"):
            prepared(dataset_name=write(rows), unlabelled_files=[str(tmp_path / "new.csv")])


RULES = "the quick brown fox jumps over the lazy dog " * 4


@pytest.mark.parametrize(
    ("config", "warned"),
    [
        pytest.param({"prompt": RULES + "{text}"}, False, id="text-last"),
        pytest.param({"prompt": "{text}" + RULES}, True, id="text-first"),
        pytest.param({"prompt": "{text} is one of {labels} " + RULES}, True, id="labels-late"),
        pytest.param({**RATED, "prompt": RULES + "{text} {dimension}"}, False, id="dimension-last"),
        pytest.param({**RATED, "prompt": "{text}" + RULES + "{dimension}"}, True, id="shared-by-one-text"),
        pytest.param({**RATED, "prompt": RULES + "{dimension} {text}"}, True, id="dimension-first"),
    ],
)
def test_a_costly_order_is_said_and_recorded(
    prepared: Prepared,
    write: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
    config: dict[str, Any],
    warned: bool,
) -> None:
    with caplog.at_level(logging.WARNING):
        given = config if "dimensions" in config else {**config, "labels": LEVELS, "label_column": "joy"}
        output, _ = prepared(dataset_name=write(rated()), **given)
    card = json.loads((output / "card.json").read_text())["prompt_order"]
    found = [record.getMessage() for record in caplog.records if "computed again" in record.getMessage()]
    assert (len(found) == 1) is warned
    assert (card["share"] >= 0.05) is warned
    if warned:
        assert f"about {card['tokens_again']} of each prompt's" in found[0]
        assert "\n" not in found[0]
        assert "computed again" in (output / "README.md").read_text()


def test_what_stands_late_is_told_from_what_stands_between() -> None:
    found = order("a {{x}} {labels} b {text} c {labels} d {dimension} e {description} f", dimensions=True)
    assert (found.late, found.between, found.dimension_first) == (" e  f", " c {labels} d ", False)
    assert order("{dimension} a {text}", dimensions=True).dimension_first
    assert order("{dimension} a {text}", dimensions=False).late == " a "


@pytest.mark.parametrize(
    ("task", "columns", "form", "labels", "rows"),
    [
        pytest.param(
            "dataverse",
            {"title": "Ice cores", "description": "drilled", "subjects": ["Physics", "Chemistry"]},
            "labels",
            14,
            1,
            id="dataverse",
        ),
        pytest.param("flourishing", {"text": "glad to be home"}, "label", 3, 46, id="flourishing"),
    ],
)
def test_the_recipes_are_of_their_form(
    prepared: Prepared,
    write: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
    task: str,
    columns: dict[str, Any],
    form: str,
    labels: int,
    rows: int,
) -> None:
    config = {key: one.value for key, one in resolve(Choice(task=task), known_keys()).settings.items()}
    config = {key: value for key, value in config.items() if key in PrepareConfig.model_fields}
    made = [{**columns, **dict.fromkeys(config.get("dimensions", ()), "high")}]
    output, facts = prepared(**{**config, "dataset_name": write(made), "test_size": 0, "validation_size": 0})
    assert facts["rows"] == {"train": rows}
    found = read_task(output)
    assert (found.form, len(found.labels)) == (form, labels)
    assert not [record for record in caplog.records if "computed again" in record.getMessage()]

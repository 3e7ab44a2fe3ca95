"""The prepare stage as a whole: what it writes, drops, reports and refuses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from tunemill.data import prepare as stage
from tunemill.data.config import PrepareConfig
from tunemill.errors import BadDataError, TransientError, UsageError
from tunemill.prompting import read_prompting
from tunemill.work import Facts, Work

Prepared = Callable[..., tuple[Path, Facts]]

FRUIT = ["apple", "pear", "plum", "cherry", "quince"]
TOOLS = ["hammer", "saw", "file", "plane", "chisel"]


def rows(number: int = 60) -> list[dict[str, Any]]:
    """Distinct texts of two labels, two thirds of them fruit."""
    made = []
    for n in range(number):
        words, label = (TOOLS, "tool") if n % 3 == 0 else (FRUIT, "fruit")
        text = f"number {n * 7919 % 1000} is a {words[n % 5]} of the year {1900 + n}"
        made.append({"id": f"r{n}", "text": text, "label": label})
    return made


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(content: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(json.dumps(row) for row in content))
        return str(path)

    return write


def read(output: Path, split: str) -> list[dict[str, Any]]:
    return list(parquet.read_table(output / f"{split}.parquet").to_pylist())


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def test_what_is_written(prepared: Prepared, write: Callable[..., str], base: Path) -> None:
    output, facts = prepared(
        dataset_name=write(rows()), labels=["fruit", "tool"], prompt="{labels}? {text}", validation_size=0.1,
        dataset_license="CC0-1.0", system_prompt="Sort: {labels}.", task="garden",
    )  # fmt: skip
    assert {path.name for path in output.iterdir()} == {
        "train.parquet", "validation.parquet", "test.parquet", "labels.json", "task.json", "card.json",
        "README.md", "prompting.json", "content_free.json",
    }  # fmt: skip
    assert facts["rows"] == {"train": 42, "validation": 6, "test": 12}
    row = read(output, "train")[0]
    assert list(row) == ["id", "prompt", "completion", "text", "label", "group"]
    assert row["prompt"] == [
        {"role": "system", "content": "Sort: fruit, tool."},
        {"role": "user", "content": f"fruit, tool? {row['text']}"},
    ]
    assert row["completion"] == row["label"]
    assert json.loads((output / "labels.json").read_text()) == [
        {"name": "fruit", "code": None},
        {"name": "tool", "code": None},
    ]
    task = json.loads((output / "task.json").read_text())
    assert (task["task"], task["form"], task["prompt"]) == ("garden", "label", "{labels}? {text}")
    assert read_prompting(output) == read_prompting(base)
    card = json.loads((output / "card.json").read_text())
    assert card["license"] == "CC0-1.0"
    assert sum(card["labels"]["tool"].values()) == 20
    assert "| fruit | 28 (66.7%) | 4 (66.7%) | 8 (66.7%) |" in (output / "README.md").read_text()


def test_the_same_input_and_seed_give_the_same_bytes(prepared: Prepared, write: Callable[..., str]) -> None:
    name = write(rows())
    one, _ = prepared("one", dataset_name=name)
    two, _ = prepared("two", dataset_name=name)
    other, _ = prepared("other", dataset_name=name, seed=7)
    assert digests(one) == digests(two)
    assert digests(one)["test.parquet"] != digests(other)["test.parquet"]


def test_lengths_are_those_of_the_rendered_text(
    prepared: Prepared, write: Callable[..., str], base: Path
) -> None:
    from transformers import AutoTokenizer

    long = {"id": "long", "text": "fox " * 300, "label": "tool"}
    output, facts = prepared(dataset_name=write([*rows(), long]), max_length=200)
    assert facts["dropped"]["too_long"] == 1
    card = json.loads((output / "card.json").read_text())
    assert card["dropped_ids"]["too_long"] == ["long"]
    tokenizer, prompting = AutoTokenizer.from_pretrained(base), read_prompting(base)
    texts = [prompting.prompt(row["prompt"]) for row in read(output, "train")]
    assert all(text.startswith("<s>") for text in texts)
    assert card["tokens"]["train"]["prompt"]["100%"] == max(
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts
    )


def test_repetitions_blanks_and_special_tokens_are_counted(
    prepared: Prepared, write: Callable[..., str]
) -> None:
    made = rows()
    extra = [
        {**made[4], "id": "again"},
        {"id": "blank", "text": "  ", "label": "tool"},
        {**made[7], "id": "contradiction", "label": "tool"},
        {"id": "special", "text": "ends here </s> or not", "label": "tool"},
    ]
    output, facts = prepared(dataset_name=write(made + extra))
    assert facts["dropped"] == {"blank": 1, "duplicate": 1, "leak": 0, "too_long": 0}
    card = json.loads((output / "card.json").read_text())
    assert card["dropped_ids"]["duplicate"] == ["again"]
    assert card["contradictory_ids"] == [["r7", "contradiction"]]
    assert card["special_token_ids"] == [["special", "</s>"]]


def test_a_given_test_set_is_kept_and_cleaned_from_training(
    prepared: Prepared, write: Callable[..., str]
) -> None:
    made = rows()
    test = [{**row, "id": f"t{n}"} for n, row in enumerate(made[:5])]
    test.append({"id": "t5", "text": made[9]["text"] + " or so", "label": made[9]["label"]})
    output, facts = prepared(
        dataset_name=write(made), test_files=[write(test, "held.jsonl")], near_duplicate_threshold=0.7
    )
    assert [row["id"] for row in read(output, "test")] == ["t0", "t1", "t2", "t3", "t4", "t5"]
    train = {row["id"] for row in read(output, "train")}
    assert train == {row["id"] for row in made} - {"r0", "r1", "r2", "r3", "r4", "r9"}
    assert facts["dropped"]["leak"] == 6


def test_a_directory_names_its_splits(prepared: Prepared, write: Callable[..., str], tmp_path: Path) -> None:
    made = rows()
    write(made[:40], "set/train.jsonl")
    write(made[40:50], "set/dev.jsonl")
    write(made[50:], "set/test.jsonl")
    write([{"unrelated": 1}], "set/predictions.jsonl")
    output, facts = prepared(dataset_name=str(tmp_path / "set"))
    assert facts["rows"] == {"train": 40, "validation": 10, "test": 10}
    assert [row["id"] for row in read(output, "test")] == [row["id"] for row in made[50:]]


def test_a_glob_reads_every_file(prepared: Prepared, write: Callable[..., str], tmp_path: Path) -> None:
    made = rows()
    write(made[:30], "part-1.jsonl")
    write(made[30:], "part-2.jsonl")
    _, facts = prepared(dataset_name=str(tmp_path / "part-*.jsonl"))
    assert facts["rows_read"] == 60


def test_a_saved_dataset_keeps_its_label_names(prepared: Prepared, tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["tool", "fruit"])})
    columns = {"text": [row["text"] for row in rows()], "label": [row["label"] for row in rows()]}
    data = Dataset.from_dict(columns, features=features)
    DatasetDict({"train": data.select(range(50)), "held": data.select(range(50, 60))}).save_to_disk(
        str(tmp_path / "saved")
    )
    config = {"dataset_name": str(tmp_path / "saved"), "dataset_test_split": "held"}
    output, facts = prepared(**config)
    assert facts["rows"] == {"train": 50, "test": 10}
    assert {row["label"] for row in read(output, "train")} == {"tool", "fruit"}
    with pytest.raises(BadDataError, match="no split 'none'"):
        prepared("other", **{**config, "dataset_test_split": "none"})


def test_free_answers_have_no_labels(prepared: Prepared, write: Callable[..., str]) -> None:
    made = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}."} for n in range(20)]
    output, facts = prepared(dataset_name=write(made))
    assert facts["form"] == "text"
    assert json.loads((output / "labels.json").read_text()) == []
    assert read(output, "train")[0]["label"] is None


@pytest.mark.parametrize(
    ("content", "config", "words"),
    [
        pytest.param([], {}, "is empty", id="empty"),
        pytest.param(
            [{"text": " ", "label": "a"}, {"text": "", "label": "b"}], {}, "2 blank", id="only blanks"
        ),
        pytest.param(rows(), {"max_length": 3}, "60 too_long", id="all too long"),
        pytest.param(
            [{**row, "id": "same"} for row in rows()], {}, "rows.jsonl line 1 and rows.jsonl line 2", id="ids"
        ),
        pytest.param([*rows(), {"id": "x", "label": "tool"}], {}, "line 61 has no 'text'", id="no text"),
        pytest.param(
            rows(), {"labels": ["tool", "fruits"]}, "line 2 has the label 'fruit'.*'fruits'", id="label"
        ),
    ],
)
def test_bad_data_is_one_line(
    prepared: Prepared,
    write: Callable[..., str],
    content: list[dict[str, Any]],
    config: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(BadDataError, match=words) as error:
        prepared(dataset_name=write(content), **config)
    assert "\n" not in str(error.value)


def test_a_base_without_tokenizer(
    work: Callable[..., Work[Any]], write: Callable[..., str], base: Path
) -> None:
    broken = base.parent / "broken"
    broken.mkdir()
    (broken / "tokenizer_config.json").write_text((base / "tokenizer_config.json").read_text())
    (broken / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(BadDataError, match="tokenizer") as error:
        stage.prepare(work(PrepareConfig(dataset_name=write(rows())), base=broken))
    assert "\n" not in str(error.value)


def test_a_large_split_is_several_row_groups_of_the_same_rows(
    prepared: Prepared, write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(rows())
    whole, _ = prepared("whole", dataset_name=source)
    monkeypatch.setattr(stage, "BATCH", 7)
    monkeypatch.setattr(stage, "ROW_GROUP", 1)
    parts, _ = prepared("parts", dataset_name=source)
    with parquet.ParquetFile(parts / "train.parquet") as file:
        assert file.metadata.num_row_groups == 7
        sizes = [len(batch) for batch in file.iter_batches(20)]  # infer counts on batches of one size
    assert sizes == [20, 20, 8]
    assert read(parts, "train") == read(whole, "train")


def test_a_full_disk(
    work: Callable[..., Work[Any]], write: Callable[..., str], base: Path, full_disk: Path
) -> None:
    made = work(PrepareConfig(dataset_name=write(rows(3000))), base=base)
    with pytest.raises(TransientError, match="no space left") as error:
        stage.prepare(replace(made, output=full_disk))
    assert error.value.exit_code == 75
    assert not [path for path in full_disk.iterdir() if path.name.startswith(".")]
    for path in full_disk.glob("*.parquet"):
        parquet.read_table(path)


class TestCheck:
    def test_a_missing_file(self) -> None:
        with pytest.raises(UsageError, match=r"no file is at nowhere\.csv"):
            stage.check(PrepareConfig(dataset_name="nowhere.csv"))

    def test_an_empty_directory(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="holds no data file"):
            stage.check(PrepareConfig(dataset_name=str(tmp_path)))

    def test_a_hub_dataset_needs_its_revision(self) -> None:
        with pytest.raises(UsageError, match="dataset_revision"):
            stage.check(PrepareConfig(dataset_name="someone/data"))

    def test_an_edited_file_changes_what_is_read(self, write: Callable[..., str]) -> None:
        config = PrepareConfig(dataset_name=write(rows()))
        before = stage.reads(config)
        write(rows(59))
        assert stage.reads(config) != before

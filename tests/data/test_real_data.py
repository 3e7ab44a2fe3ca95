"""Real datasets through the whole stage; skipped where they are absent."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from tunemill.work import Facts

DATA = Path(os.environ.get("TUNEMILL_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
Prepared = Callable[..., tuple[Path, Facts]]

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no real data: set TUNEMILL_TEST_DATA")


def test_cap_has_its_own_test_set(prepared: Prepared) -> None:
    codes = json.loads((DATA / "cap" / "labels.json").read_text())
    output, facts = prepared(
        dataset_name=str(DATA / "cap" / "train.csv"), test_files=[str(DATA / "cap" / "test.csv")],
        labels=codes, label_column="label", text_column="text",
        prompt="Topics: {labels}\nSubject: {subject}\nQuestion: {text}", max_length=8192,
    )  # fmt: skip
    with (DATA / "cap" / "test.csv").open(encoding="utf-8", newline="") as lines:
        given = {row["id"]: codes[row["label"]] for row in csv.DictReader(lines)}
    test = parquet.read_table(output / "test.parquet").to_pylist()
    assert {row["id"]: row["label"] for row in test} == given
    assert facts["labels"] == 21
    train = parquet.read_table(output / "train.parquet").to_pylist()
    assert not {row["group"] for row in test} & {row["group"] for row in train}
    assert facts["rows"]["train"] + sum(facts["dropped"].values()) + len(test) == facts["rows_read"]


def test_cap_as_a_directory_takes_train_and_test_only(prepared: Prepared) -> None:
    _, facts = prepared(dataset_name=str(DATA / "cap"), max_length=8192)
    assert facts["labels"] <= 21
    assert facts["rows"]["test"] == len(
        list(csv.DictReader((DATA / "cap" / "test.csv").open(encoding="utf-8")))
    )


def test_alpaca_seed_tasks(prepared: Prepared) -> None:
    output, facts = prepared(dataset_name=str(DATA / "alpaca" / "seed_tasks.jsonl"), max_length=8192)
    assert facts["rows_read"] == 175
    assert facts["form"] == "text"
    row = parquet.read_table(output / "train.parquet").to_pylist()[0]
    assert row["prompt"][0]["content"]
    assert row["completion"]


def test_tatqa_questions_carry_their_table(prepared: Prepared) -> None:
    output, facts = prepared(
        dataset_name=str(DATA / "tatqa" / "dev.json"), id_column="uid", text_column="question",
        completion_column="answer_with_scale", group_column="context",
        prompt="{table}\n\n{paragraphs}\n\n{text}", max_length=100_000,
    )  # fmt: skip
    assert facts["rows_read"] == 1668
    assert facts["form"] == "text"
    tables = [parquet.read_table(output / f"{split}.parquet") for split in ("train", "test")]
    rows = [row for table in tables for row in table.to_pylist()]
    train, test = ({row["prompt"][0]["content"].split("\n\n")[0] for row in t.to_pylist()} for t in tables)
    assert not train & test  # no table is both learnt from and asked about
    assert all(" | " in row["prompt"][0]["content"] for row in rows)
    assert "$1,496.5 million" in {row["completion"] for row in rows}

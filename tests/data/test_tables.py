"""Every kind of file gives the same rows, and a damaged one is named with its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunemill.data.tables import read_table
from tunemill.errors import BadDataError

ROWS = [
    {"id": "1", "text": "One, two", "label": "a"},
    {"id": "2", "text": 'Line\nbreak "here"', "label": "b"},
]


def write_jsonl(path: Path) -> None:
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS))


def write_json(path: Path) -> None:
    path.write_text(json.dumps({"data": ROWS}))


def write_csv(path: Path) -> None:
    path.write_text('\ufeffid,text,label\n1,"One, two",a\n2,"Line\nbreak ""here""",b\n', encoding="utf-8")


def write_semicolons(path: Path) -> None:
    path.write_text('id;text;label\n1;One, two;a\n2;"Line\nbreak ""here""";b\n\n')


def write_tsv(path: Path) -> None:
    path.write_text('id\ttext\tlabel\n1\tOne, two\ta\n2\t"Line\nbreak ""here"""\tb\n')


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def write_xlsx(path: Path) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(["id", "text", "label"])
    for row in ROWS:
        book.active.append(list(row.values()))
    book.active.append([None, None, None])
    book.save(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", write_jsonl),
        ("rows.json", write_json),
        ("rows.csv", write_csv),
        ("semicolons.csv", write_semicolons),
        ("rows.tsv", write_tsv),
        ("rows.parquet", write_parquet),
        ("rows.xlsx", write_xlsx),
    ],
)
def test_every_kind_gives_the_same_rows(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    assert [row.values for row in read_table(tmp_path / name)] == ROWS


def test_rows_say_where_they_are(tmp_path: Path) -> None:
    write_csv(tmp_path / "rows.csv")
    write_jsonl(tmp_path / "rows.jsonl")
    assert [row.where for row in read_table(tmp_path / "rows.csv")] == ["rows.csv row 1", "rows.csv row 2"]
    assert [row.where for row in read_table(tmp_path / "rows.jsonl")] == [
        "rows.jsonl line 1",
        "rows.jsonl line 3",
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        pytest.param("a.jsonl", b'{"a": 1}\n{"a": ', "a.jsonl line 2", id="jsonl cut off"),
        pytest.param("a.jsonl", b'{"a": 1}\n[1]', "a.jsonl line 2", id="jsonl no object"),
        pytest.param("a.json", b'{"a": 1}', "no list", id="json no list"),
        pytest.param("a.json", b'[{"a": 1}, 2]', "row 2", id="json row no object"),
        pytest.param("a.json", b"[" * 100_000, "not JSON", id="json too deep"),
        pytest.param("a.csv", b"a,b\n1,2\n1,2,3\n", "row 2 has 3 fields", id="csv ragged"),
        pytest.param("a.csv", b'a,b\n1,"2\n', "not csv", id="csv quote open"),
        pytest.param("a.csv", b"a,a\n1,2\n", "two columns", id="csv column twice"),
        pytest.param("a.csv", b"a,b\n\xff,2\n", "not UTF-8", id="csv latin-1"),
        pytest.param("a.parquet", b"PAR1 and no more", "parquet", id="parquet cut off"),
        pytest.param("a.xlsx", b"PK no zip", "xlsx", id="xlsx no zip"),
        pytest.param("a.docx", b"", "kinds that can be read", id="unknown kind"),
        pytest.param(
            "a.json", b'[{"table": {}, "questions": []}]', "entry 1 is not as in TAT-QA", id="tatqa"
        ),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadDataError, match=words) as error:
        read_table(tmp_path / name)
    assert "\n" not in str(error.value)


def test_tatqa_becomes_one_row_per_question(tmp_path: Path) -> None:
    questions: list[dict[str, Any]] = [
        {
            "uid": "q1",
            "question": "How much?",
            "answer": 12.5,
            "scale": "million",
            "answer_type": "arithmetic",
        },
        {"uid": "q2", "question": "Which?", "answer": ["red", "blue"], "scale": ""},
    ]
    context = {
        "table": {"uid": "t", "table": [["", "2019"], ["Sales", "$ 1,452.4"]]},
        "paragraphs": [{"order": 10, "text": "Third."}, {"order": 2, "text": "Second."}],
        "questions": questions,
    }
    (tmp_path / "dev.json").write_text(json.dumps([context]))
    one, two = (row.values for row in read_table(tmp_path / "dev.json"))
    assert one["table"] == " | 2019\nSales | $ 1,452.4"
    assert one["paragraphs"] == "Second.\nThird."
    assert (one["answer"], one["answer_with_scale"]) == ("12.5", "12.5 million")
    assert two["answer_with_scale"] == "red; blue"

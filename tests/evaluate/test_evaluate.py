"""The stage as the harness calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tunemill.errors import BadDataError
from tunemill.evaluate.baselines import Tfidf, Training, majority
from tunemill.evaluate.evaluate import evaluate, read_clusters
from tunemill.evaluate.predictions import read_predictions

Make = Callable[..., Any]


def test_figures_of_the_stage(rows: Any, write_inputs: Make, make_work: Make) -> None:
    work = make_work(write_inputs(rows))
    facts = evaluate(work)
    assert (facts["rows"], facts["errors"]) == (30, 2)
    assert facts["accuracy"] == pytest.approx(20 / 30)
    assert facts["accuracy_low"] < facts["accuracy"] < facts["accuracy_high"]
    assert facts["majority_accuracy"] == pytest.approx(1 / 3)
    assert facts["tfidf_accuracy"] == 1  # its words give each label away
    record = json.loads((work.output / "report.json").read_text())
    assert record["figures"]["accuracy"]["value"] == facts["accuracy"]
    assert record["inputs"][0]["reference"].startswith("tiny-parts/data@sha256:")
    assert {"per_class", "matrix", "macro_f1", "top"} <= set(record["figures"])


def test_the_page_names_the_command_that_makes_it_again(
    rows: Any, write_inputs: Make, make_work: Make
) -> None:
    work = make_work(write_inputs(rows), quant="F16", seed=7)
    evaluate(work)
    page = (work.output / "report.html").read_text()
    assert "tunemill evaluate --run tiny-parts --input data=tiny-parts/data@sha256:" in page
    assert "--set quant=F16 --set seed=7" in page


def test_texts_from_data_cannot_become_markup(rows: Any, write_inputs: Make, make_work: Make) -> None:
    evil = "<script>alert(1)</script>"
    for row in rows:
        row["text"] = evil
        row["id"] = row["id"] + '"><img src=x>'
        row["error"] = row["error"] and evil
    labels = ["files", "nets", "</title><b>"]
    for row in rows:
        for key in ("label", "gold"):
            row[key] = labels[2] if row[key] == "texts" else row[key]
    work = make_work(write_inputs(rows, labels, training=0))
    evaluate(work)
    page = (work.output / "report.html").read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "</title><b>" not in page
    assert "&lt;script&gt;" in page


def test_same_inputs_same_bytes(rows: Any, write_inputs: Make, make_work: Make, tmp_path: Path) -> None:
    work = make_work(write_inputs(rows))
    seen = set()
    for _ in range(2):
        evaluate(work)
        seen.add(tuple(path.read_bytes() for path in sorted(work.output.iterdir())))
    assert len(seen) == 1


def test_without_a_train_split_the_report_says_why_there_are_no_baselines(
    rows: Any, write_inputs: Make, make_work: Make
) -> None:
    work = make_work(write_inputs(rows, training=0))
    assert "tfidf_accuracy" not in evaluate(work)
    assert "no labelled train split" in (work.output / "report.html").read_text()


def test_free_answers_have_their_own_figures(rows: Any, write_inputs: Make, make_work: Make) -> None:
    for row in rows:
        row["probabilities"] = row["probability"] = None
        row["label"] = row["label"] and f"the {row['label']}."
    work = make_work(write_inputs(rows, labels=()))
    facts = evaluate(work)
    assert facts["exact_match"] == pytest.approx(20 / 30)
    assert "Token F1" in (work.output / "report.html").read_text()


def test_near_duplicates_are_one_cluster(rows: Any, write_inputs: Make) -> None:
    inputs = write_inputs(rows, groups=[n // 2 + 100 for n in range(30)])
    predictions = read_predictions(inputs / "predictions")
    assert list(read_clusters(inputs / "data", predictions)) == [n // 2 for n in range(30)]


def test_another_split_with_the_same_ids_is_not_taken_for_the_judged_one(
    rows: Any, write_inputs: Make
) -> None:
    inputs = write_inputs(rows, groups=[n // 2 for n in range(30)])
    table = pyarrow.parquet.read_table(inputs / "data" / "test.parquet").to_pylist()
    others = [{**row, "text": "another text", "group": 0} for row in table]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(others), inputs / "data" / "unlabelled.parquet")
    predictions = read_predictions(inputs / "predictions")
    assert list(read_clusters(inputs / "data", predictions)) == [n // 2 for n in range(30)]


def test_majority_takes_the_first_name_of_equals() -> None:
    labels = (("b",), ("a",), ("b",), ("a",))
    assert majority(Training(("x",) * 4, labels), ["y", "z"]) == [("a",), ("a",)]


def test_tfidf_refuses_what_cannot_be_learned() -> None:
    learn = Tfidf(100, 100, 1, False)
    assert learn(Training(("words here",), (("a",),)), ["x"]) is None
    assert learn(Training(("?", "!"), (("a",), ("b",))), ["x"]) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"gold": "elsewhere"}, "row-3 has the gold label 'elsewhere', outside", id="gold"),
        pytest.param({"label": "elsewhere"}, "row-3 has the predicted label", id="predicted"),
        pytest.param({"gold": None}, "row-3 has no gold answer", id="no-gold"),
        pytest.param({"label": None}, "row-3 has neither an answer nor an error", id="nothing"),
        pytest.param({"probabilities": [1.0]}, "1 probabilities in a row, the task 3 labels", id="shares"),
    ],
)
def test_a_row_that_cannot_be_judged_is_named(
    rows: Any, write_inputs: Make, make_work: Make, change: dict[str, Any], message: str
) -> None:
    rows[3].update(change)
    with pytest.raises(BadDataError, match=message) as caught:
        evaluate(make_work(write_inputs(rows)))
    assert "\n" not in str(caught.value)


def test_damaged_predictions_are_refused(rows: Any, write_inputs: Make, make_work: Make) -> None:
    inputs = write_inputs(rows)
    (inputs / "predictions" / "predictions.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadDataError, match=r"predictions.parquet cannot be read .*run infer again"):
        evaluate(make_work(inputs))


def test_a_column_of_another_type_is_refused(rows: Any, write_inputs: Make, make_work: Make) -> None:
    path = write_inputs(rows) / "predictions" / "predictions.parquet"
    table = pyarrow.parquet.read_table(path)
    place = table.column_names.index("label")
    wrong = table.set_column(place, "label", pyarrow.array([["files"]] * len(rows)))
    pyarrow.parquet.write_table(wrong, path)
    with pytest.raises(BadDataError, match=r"predictions.parquet cannot be read .*run infer again") as caught:
        read_predictions(path.parent)
    assert "\n" not in str(caught.value)


def test_data_without_a_column_is_refused(rows: Any, write_inputs: Make, make_work: Make) -> None:
    inputs = write_inputs(rows)
    path = inputs / "data" / "test.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).drop_columns(["group"]), path)
    with pytest.raises(BadDataError, match=r"test.parquet lacks the column group: run prepare again"):
        evaluate(make_work(inputs))


def test_a_text_of_many_rows_is_in_memory_once(rows: Any, write_inputs: Make) -> None:
    for row in rows:
        row["text"] = "what is rated on many dimensions"
    texts = read_predictions(write_inputs(rows) / "predictions").texts
    assert len(texts) == 30
    assert len({id(text) for text in texts}) == 1


def test_clusters_are_rows_when_the_data_does_not_know_them(rows: Any, write_inputs: Make) -> None:
    inputs = write_inputs(rows)
    (inputs / "data" / "test.parquet").unlink()
    predictions = read_predictions(inputs / "predictions")
    assert (read_clusters(inputs / "data", predictions) == np.arange(30)).all()

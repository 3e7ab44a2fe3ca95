"""The stage as the harness calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunemill.errors import BadDataError
from tunemill.evaluate.baselines import Training, majority, tfidf
from tunemill.evaluate.evaluate import evaluate, read_clusters
from tunemill.evaluate.predictions import read_csv, read_predictions

Make = Callable[..., Any]
VOID = {"meta", "rect", "line", "br"}


class Page(HTMLParser):
    """What a browser would have to fetch or run, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


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


def test_the_page_stands_alone_and_has_every_section(rows: Any, write_inputs: Make, make_work: Make) -> None:
    work = make_work(write_inputs(rows))
    evaluate(work)
    text = (work.output / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe", "object")]
    assert not [attributes for _, attributes in page.tags if {"src", "href"} & set(attributes)]
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert sections == ["comparison", "classes", "confusion", "worst", "errors", "provenance"]
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) == 2
    assert all(one["role"] == "img" and one["aria-labelledby"] for one in pictures)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert "66.7 %" in text


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


def test_majority_takes_the_first_name_of_equals() -> None:
    assert majority(Training(("x",) * 4, ("b", "a", "b", "a")), 2) == ["a", "a"]


def test_tfidf_refuses_what_cannot_be_learned() -> None:
    assert tfidf(Training(("words here",), ("a",)), ["x"], 100, 100) is None
    assert tfidf(Training(("?", "!"), ("a", "b")), ["x"], 100, 100) is None


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


def test_a_table_from_elsewhere_is_read(tmp_path: Path) -> None:
    path = tmp_path / "study.csv"
    path.write_text("n,true,said\n1,10,10\n2,9,10\n3,9,\n")
    given = read_csv(path, gold="true", predicted="said", identifier="n")
    assert given.labels == ("9", "10")
    assert given.answers == ("10", "10", None)
    assert given.errors == (None, None, "no answer")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("a,b\n1,2\n", "has no column true: choose from a, b", id="column"),
        pytest.param("true,said\n", "has no rows", id="empty"),
        pytest.param("true,said\n,x\n", "row 1 has no gold answer", id="gold"),
    ],
)
def test_a_table_that_cannot_be_judged_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "study.csv"
    path.write_text(content)
    with pytest.raises(BadDataError, match=message):
        read_csv(path, gold="true", predicted="said")


def test_clusters_are_rows_when_the_data_does_not_know_them(rows: Any, write_inputs: Make) -> None:
    inputs = write_inputs(rows)
    (inputs / "data" / "test.parquet").unlink()
    predictions = read_predictions(inputs / "predictions")
    assert (read_clusters(inputs / "data", predictions) == np.arange(30)).all()

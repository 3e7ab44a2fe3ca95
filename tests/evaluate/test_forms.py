"""The stage with every form of task: artifacts in, report out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from backends import provenance
from tunemill.cli import run
from tunemill.errors import BadDataError
from tunemill.evaluate.config import STAGE, EvaluateConfig
from tunemill.evaluate.evaluate import evaluate, read_clusters
from tunemill.evaluate.predictions import read_predictions
from tunemill.progress import Progress
from tunemill.store import Draft, open_store
from tunemill.work import Input, Work

Make = Callable[..., Any]
ROUNDS = {"bootstrap_rounds": 200}


def sets(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turn rows of one label into rows of two, the second always right."""
    made = []
    for row in rows:
        golds = [row["gold"], "common"]
        labels = None if row["label"] is None else [row["label"], "common"]
        shares = row["probabilities"] and [*row["probabilities"], 0.9]
        joined = {"gold": "; ".join(golds), "label": labels and "; ".join(labels)}
        made.append({**row, **joined, "golds": golds, "labels": labels, "probabilities": shares})
    return made


def dimensions(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turn rows into ratings of fifteen texts on two dimensions."""
    return [
        {**row, "id": f"t{n // 2}/{name}", "item": f"t{n // 2}", "dimension": name}
        for n, row in enumerate(rows)
        for name in [("hope", "trust")[n % 2]]
    ]


def training_of(folder: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    table = pyarrow.parquet.read_table(folder / "data" / "train.parquet")
    for name, values in columns.items():
        table = table.append_column(name, pyarrow.array(list(values)))
    pyarrow.parquet.write_table(table, folder / "data" / "train.parquet")


def report(work: Work[EvaluateConfig]) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((work.output / "report.json").read_text())
    return record


def test_sets_of_labels(rows: Any, write_inputs: Make, make_work: Make) -> None:
    labels = ("files", "nets", "texts", "common")
    inputs = write_inputs(sets(rows), labels, form="labels", max_labels=2)
    names = pyarrow.parquet.read_table(inputs / "data" / "train.parquet")["label"].to_pylist()
    training_of(inputs, {"labels": [[name, "common"] for name in names]})
    work = make_work(inputs, **ROUNDS)
    facts = evaluate(work)
    assert facts["exact_match"] == pytest.approx(20 / 30)
    assert facts["any_overlap"] == pytest.approx(28 / 30)  # two rows have no answer
    assert facts["tfidf_exact_match"] == 1  # its words give each label away
    record = report(work)
    assert record["form"] == "labels"
    assert record["calibration"]["what"] == "label"
    assert record["confusions"][0]["gold"] == "files"
    assert record["agreement"] is None


def test_levels_of_dimensions(rows: Any, write_inputs: Make, make_work: Make) -> None:
    inputs = write_inputs(dimensions(rows), ordered=True, dimensions=["hope", "trust"])
    training_of(inputs, {"dimension": ["hope", "trust"] * 15})
    work = make_work(inputs, **ROUNDS)
    facts = evaluate(work)
    assert facts["accuracy"] == pytest.approx(20 / 30)
    assert facts["mean_absolute_error"] > 0
    assert facts["tfidf_accuracy"] == 1
    record = report(work)
    assert [one["dimension"] for one in record["ratings"]] == [None, "hope", "trust"]
    assert record["agreement"]["level_of_measurement"] == "ordinal"
    assert "resamples of single texts" in record["remarks"][0]


def test_rows_of_one_text_are_one_cluster(rows: Any, write_inputs: Make) -> None:
    inputs = write_inputs(dimensions(rows), ordered=True, dimensions=["hope", "trust"])
    predictions = read_predictions(inputs / "predictions")
    for _ in range(2):  # groups are known, then not
        assert list(read_clusters(inputs / "data", predictions)) == [n // 2 for n in range(30)]
        (inputs / "data" / "test.parquet").unlink(missing_ok=True)


def test_a_dimension_that_the_task_does_not_have_is_refused(rows: Any, write_inputs: Make) -> None:
    inputs = write_inputs(dimensions(rows), ordered=True, dimensions=["hope", "joy"])
    with pytest.raises(BadDataError, match="row t0/trust is about 'trust', no dimension of the task"):
        read_predictions(inputs / "predictions")


def test_numbers_and_spans(rows: Any, write_inputs: Make, make_work: Make) -> None:
    for n, row in enumerate(rows):
        row["probabilities"] = None
        row["gold"] = f"{n} million"
        row["label"] = row["label"] and (f"${n},000,000" if n else "0 million")
    work = make_work(write_inputs(rows, (), answer_kind="numbers-and-spans"), **ROUNDS)
    facts = evaluate(work)
    assert facts["exact_match"] == facts["numeracy_f1"] == pytest.approx(28 / 30)
    assert [one["name"] for one in report(work)["figures"]["by_kind"]] == ["number"]


def with_corpus(work: Work[EvaluateConfig], folder: Path) -> Work[EvaluateConfig]:
    given = Input("tiny-parts/predictions-all@sha256:0", "corpus", "predictions", folder, {})
    return replace(work, inputs={**work.inputs, "corpus": given})


def test_prevalences_are_corrected_for_a_corpus_without_gold(
    rows: Any, write_inputs: Make, make_work: Make, tmp_path: Path
) -> None:
    inputs = write_inputs(rows)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("labels.json", "task.json"):
        (corpus / name).write_bytes((inputs / "predictions" / name).read_bytes())
    table = pyarrow.Table.from_pylist([{**row, "gold": None} for row in rows])
    pyarrow.parquet.write_table(table, corpus / "predictions.parquet")
    work = with_corpus(make_work(inputs, **ROUNDS), corpus)
    evaluate(work)
    found = report(work)["prevalences"]
    assert (found["corpus"], found["rows"], found["method"]) == (True, 30, "confusion-matrix")
    # it errs exactly as on the judged rows, so their shares come out
    assert [one["corrected"]["value"] for one in found["labels"]] == pytest.approx([1 / 3] * 3, abs=1e-4)
    (corpus / "labels.json").write_text(
        '[{"name": "files"}, {"name": "nets"}, {"name": "texts"}, {"name": "x"}]'
    )
    pyarrow.parquet.write_table(
        table.drop_columns(["probabilities"]).append_column("probabilities", pyarrow.nulls(30)),
        corpus / "predictions.parquet",
    )
    with pytest.raises(BadDataError, match="answered with other labels"):
        evaluate(work)


def test_a_corpus_is_one_more_input() -> None:
    assert set(STAGE.templates(EvaluateConfig())) == {"predictions", "data"}
    templates = STAGE.templates(EvaluateConfig(corpus="tiny/predictions-all"))
    assert templates["corpus"] == "tiny/predictions-all"
    assert set(templates) == {"predictions", "data", "corpus"}


def test_the_command_in_a_report_on_a_corpus_makes_it_again(
    rows: Any,
    write_inputs: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TUNEMILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TUNEMILL_STORE", str(tmp_path / "store"))
    store, inputs = open_store(str(tmp_path / "store"), create=True), write_inputs(rows)
    quiet = Progress(quiet=True)
    for name, kind in (
        ("predictions-f16", "predictions"),
        ("predictions-all", "predictions"),
        ("data", "data"),
    ):
        draft = Draft(f"tiny-parts/{name}", kind, inputs / kind, {}, provenance(inputs={}))
        store.publish(draft, quiet)
    words = [
        "--set",
        "quant=F16",
        "--set",
        "corpus=tiny-parts/predictions-all",
        "--set",
        "bootstrap_rounds=100",
    ]
    assert run(["evaluate", "--run", "tiny-parts", *words, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert set(made["inputs"]) == {"predictions", "data", "corpus"}
    store.pull(store.resolve(made["reference"]), tmp_path / "report", quiet)
    record = json.loads((tmp_path / "report" / "report.json").read_text())
    assert record["prevalences"]["corpus"] is True
    assert run([*shlex.split(record["command"])[1:], "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["reference"], again["reused"]) == (made["reference"], True)

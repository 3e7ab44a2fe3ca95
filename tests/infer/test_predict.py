"""The stage as the harness calls it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from tunemill.errors import BadDataError, ConfigurationError, Stopped
from tunemill.infer.predict import predict

Make = Callable[..., Any]


def rows_of(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(output / "predictions.parquet").to_pylist()
    return rows


def test_every_row_gets_a_label_with_its_probability(
    micro: Any, dataset: Make, make_work: Make, labelled: Make
) -> None:
    given = labelled(40)
    work = make_work(micro.gguf.parent, dataset(given))
    facts = predict(work)
    rows = rows_of(work.output)
    labels = [label["name"] for label in json.loads((work.output / "labels.json").read_text())]
    assert [(row["id"], row["text"], row["gold"]) for row in rows] == [
        (f"row-{number}", text, label) for number, (text, label) in enumerate(given)
    ]
    for row in rows:
        assert sum(row["probabilities"]) == pytest.approx(1)
        assert row["probability"] == max(row["probabilities"])
        assert row["label"] == labels[row["probabilities"].index(row["probability"])]
        assert row["error"] is None
    assert len({row["probability"] for row in rows}) == len(rows)
    assert (facts["rows"], facts["errors"], facts["form"]) == (40, 0, "label")


def test_rows_that_cannot_be_asked_keep_their_place_and_say_why(
    micro: Any, dataset: Make, make_work: Make
) -> None:
    work = make_work(micro.gguf.parent, dataset([("fine", "data"), (" \n", "data"), ("x" * 1100, "files")]))
    facts = predict(work)
    fine, empty, long = rows_of(work.output)
    assert fine["error"] is None
    assert empty["error"] == "empty text"
    assert long["error"].startswith("too long: 11")
    assert long["error"].endswith("at most 1024")
    for row in (empty, long):
        assert (row["label"], row["probability"], row["probabilities"]) == (None, None, None)
    assert facts["error_reasons"] == {"empty text": 1, "too long": 1}


def test_limit_takes_the_first_rows(micro: Any, dataset: Make, make_work: Make, labelled: Make) -> None:
    work = make_work(micro.gguf.parent, dataset(labelled(20)), limit=7, block_rows=3)
    assert predict(work)["rows"] == 7
    assert [row["id"] for row in rows_of(work.output)] == [f"row-{number}" for number in range(7)]


def test_a_stop_keeps_the_finished_shards(micro: Any, dataset: Make, make_work: Make, labelled: Make) -> None:
    data = dataset(labelled(30))
    whole = make_work(micro.gguf.parent, data, "whole", block_rows=10)
    predict(whole)
    work = make_work(micro.gguf.parent, data, "stopped", block_rows=10)

    class StopAtSecondShard(threading.Event):
        def is_set(self) -> bool:
            return (work.scratch / "blocks" / "000000.parquet").exists()

    with pytest.raises(Stopped, match="go on"):
        predict(replace(work, stop=StopAtSecondShard()))
    assert (work.scratch / "blocks" / "000000.parquet").exists()
    assert not (work.output / "predictions.parquet").exists()
    predict(work)
    assert (work.output / "predictions.parquet").read_bytes() == (
        whole.output / "predictions.parquet"
    ).read_bytes()


@pytest.mark.parametrize(
    ("form", "labels", "message"),
    [
        pytest.param("label", (), "names 0 labels", id="no-labels"),
        pytest.param("label", ("data",), "names 1 labels", id="one-label"),
        pytest.param("label", ("data", "data"), "1 of them different", id="twice-the-same"),
        pytest.param("label", ("data", ""), 'every entry needs a "name"', id="nameless"),
        pytest.param("essay", (), "has the form 'essay'", id="unknown-form"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(
    micro: Any, dataset: Make, make_work: Make, form: str, labels: tuple[str, ...], message: str
) -> None:
    work = make_work(micro.gguf.parent, dataset([("text", "data")], labels, form))
    with pytest.raises(BadDataError, match=message) as caught:
        predict(work)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"split": "validation"}, "no split validation: choose split from test", id="split"),
        pytest.param({"n_ctx": 4096}, "n_ctx=4096 is more than the 1024 tokens", id="context"),
    ],
)
def test_settings_that_do_not_fit_the_inputs_are_refused(
    micro: Any, dataset: Make, make_work: Make, settings: dict[str, Any], message: str
) -> None:
    work = make_work(micro.gguf.parent, dataset([("text", "data")]), **settings)
    with pytest.raises((BadDataError, ConfigurationError), match=message):
        predict(work)


def test_no_row_at_all_is_an_error_that_names_the_reason(micro: Any, dataset: Make, make_work: Make) -> None:
    work = make_work(micro.gguf.parent, dataset([("", "data"), (" ", "data")]))
    with pytest.raises(BadDataError, match="none of the 2 rows can be predicted; the first: empty text"):
        predict(work)


def test_damaged_files_of_the_data_are_named(micro: Any, dataset: Make, make_work: Make) -> None:
    data = dataset([("text", "data")])
    (data / "test.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(BadDataError, match=r"test.parquet is no Parquet file.*run prepare again"):
        predict(make_work(micro.gguf.parent, data))
    (dataset([("text", "data")]) / "labels.json").write_text("[")
    with pytest.raises(BadDataError, match=r"labels.json cannot be read"):
        predict(make_work(micro.gguf.parent, data, "again"))

"""Tables from elsewhere: what is read, what is refused, and the command that judges them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics

from tunemill.cli import run
from tunemill.errors import BadDataError
from tunemill.evaluate.foreign import Answers, Columns, read_corpus, read_csv, read_others

DATA = Path(os.environ.get("TUNEMILL_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
PUBLISHED = DATA / "cap" / "predictions-llama-2-7b-test.csv"
PLAIN = Columns("true", "said")


def table(folder: Path, text: str, name: str = "study.csv") -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


def test_rows_are_read_as_they_are(tmp_path: Path) -> None:
    path = table(tmp_path, '\ufeffn,true,said,words\n1,10, 10 ,"a, b"\n2,9,10,\n3,9,,c\n')
    given = read_csv(path, Columns("true", "said", id="n", text="words"), Answers())
    assert given.labels == ("9", "10")
    assert given.ids == ("1", "2", "3")
    assert given.texts == ("a, b", "", "c")
    assert given.answers == ("10", "10", None)
    assert given.errors == (None, None, "no answer")


def test_a_text_of_many_rows_is_in_memory_once(tmp_path: Path) -> None:
    path = table(tmp_path, "true,said,words\n" + "9,10,one text of many rows\n" * 50)
    texts = read_csv(path, Columns("true", "said", text="words"), Answers()).texts
    assert len(texts) == 50
    assert len({id(text) for text in texts}) == 1


def test_a_text_may_have_several_labels(tmp_path: Path) -> None:
    path = table(tmp_path, "true,said\nlaw; health,health;law\nlaw,\n")
    given = read_csv(path, PLAIN, Answers(separator="; "))
    assert (given.task.form, given.task.max_labels, given.labels) == ("labels", 2, ("health", "law"))
    assert given.gold_sets == (("law", "health"), ("law",))
    assert given.answer_sets == (("health", "law"), None)
    assert given.answers == ("health; law", None)


def test_levels_and_dimensions(tmp_path: Path) -> None:
    rows = "t1,hope,low,high,\nt1,trust,low,low,low\nt2,hope,high,,mid\n"
    path = table(tmp_path, f"text,of,true,said,ann\n{rows}")
    columns = Columns("true", "said", dimension="of", item="text", coders=("ann",))
    given = read_csv(path, columns, Answers(levels=("low", "mid", "high")))
    assert given.task.ordered
    assert given.task.dimensions == ("hope", "trust")
    assert given.ids == ("t1/hope", "t1/trust", "t2/hope")
    assert given.items == ("t1", "t1", "t2")
    assert given.coders == {"ann": (None, "low", "mid")}


def test_probabilities_are_in_the_order_of_the_labels(tmp_path: Path) -> None:
    path = table(tmp_path, "true,said,p_b,p_a\nb,a,0.3,0.7\na,,,\n")
    given = read_csv(path, Columns("true", "said", probability_prefix="p_"), Answers())
    assert given.labels == ("a", "b")
    assert given.probabilities.tolist() == [[0.7, 0.3], [0, 0]]


def test_other_models_answer_the_same_rows(tmp_path: Path) -> None:
    path = table(tmp_path, "true,said,bert,gpt\na,a,b,\nb,a,b,c\n")
    columns = Columns("true", "said", versus=("bert", "gpt"))
    given = read_csv(path, columns, Answers())
    assert given.labels == ("a", "b", "c")
    others = read_others(path, columns, Answers(), given)
    assert {name: one.answers for name, one in others.items()} == {"bert": ("b", "b"), "gpt": (None, "c")}
    assert others["bert"].golds == given.golds


def test_a_corpus_needs_no_gold_and_its_labels_belong_to_the_set(tmp_path: Path) -> None:
    path, corpus = table(tmp_path, "true,said\na,a\n"), table(tmp_path, "said\nb\na\n", "all.csv")
    given = read_csv(path, PLAIN, Answers(), corpus)
    assert given.labels == ("a", "b")
    others = read_corpus(corpus, PLAIN, Answers(), given.task)
    assert (others.answers, others.ids) == (("b", "a"), ("1", "2"))


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        pytest.param(
            "a,b\n1,2\n", PLAIN, "no column said: choose from a, b, or give --delimiter", id="column"
        ),
        pytest.param("true,said\n", PLAIN, "has no rows", id="empty"),
        pytest.param("true,said\n,x\n", PLAIN, "row 1 has no gold answer", id="gold"),
        pytest.param("true,said\na,b,c\n", PLAIN, "row 1 has more fields than there are", id="surplus"),
        pytest.param('true,said\na,"b\n', PLAIN, "cannot be read: unexpected end of data", id="quote"),
        pytest.param(
            "n,true,said\n1,a,a\n1,a,b\n", Columns("true", "said", id="n"), "has the id '1' twice", id="twice"
        ),
        pytest.param(
            "true,said,p_a\na,a,1\nb,a,1\n",
            Columns("true", "said", probability_prefix="p_"),
            "no column p_b for the probability",
            id="probability-column",
        ),
        pytest.param(
            "true,said,p_a,p_b\na,a,0.5,0.6\nb,a,1,0\n",
            Columns("true", "said", probability_prefix="p_"),
            "row 1 has probabilities that sum to 1.100",
            id="probability-sum",
        ),
        pytest.param(
            "true,said,p_a,p_b\na,a,high,0\nb,a,1,0\n",
            Columns("true", "said", probability_prefix="p_"),
            "row 1 has 'high' in p_a, expected a probability",
            id="probability-word",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused(tmp_path: Path, text: str, columns: Columns, message: str) -> None:
    with pytest.raises(BadDataError, match=message) as caught:
        read_csv(table(tmp_path, text), columns, Answers())
    assert "\n" not in str(caught.value)


def test_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "study.csv"
    path.write_bytes(b"true,said\nM\xfcnchen,a\n")
    with pytest.raises(BadDataError, match=r"is not UTF-8 .*: save it as UTF-8"):
        read_csv(path, PLAIN, Answers())


def test_the_command_writes_the_report_and_names_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{'ab'[n % 2]};{'ab'[n % 3 == 0]};{'ab'[n % 2]};text {n}\n" for n in range(40))
    table(tmp_path, f"true;said;ann;words\n{rows}")
    words = ["--csv", "study.csv", "--gold", "true", "--predicted", "said", "--text", "words"]
    words += ["--versus", "ann", "--coder", "ann", "--delimiter", ";"]
    words += ["--corpus", "study.csv", "--output", "out"]
    assert run(["evaluate", *words, "--set", "bootstrap_rounds=200", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert said["report"] == "out/report.html"
    assert said["facts"]["accuracy"] == record["headlines"]["accuracy"]["value"]
    assert [one["second"] for one in record["agreement"]["pairs"]] == ["gold", "ann"]
    assert record["prevalences"]["corpus"] is True
    assert record["baselines"][0]["name"] == "ann"
    assert record["baselines"][0]["paired"]["only_second"] == round(40 * (1 - said["facts"]["accuracy"]))
    assert record["inputs"][0]["reference"] == "study.csv"
    for option in ("--csv study.csv", "--coder ann", "--delimiter ';'", "--set bootstrap_rounds=200"):
        assert option in record["command"]
    assert "no labelled train split" not in record["command"]
    assert not (tmp_path / ".tunemill").exists()


NAMED = ("--csv", "x", "--gold", "a", "--predicted", "b", "--output", "o")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        pytest.param(["--gold", "true"], 2, "--gold goes with --csv FILE", id="no-table"),
        pytest.param(["--csv", "x.csv", "--gold", "true"], 2, "--csv needs --predicted", id="no-predicted"),
        pytest.param([*NAMED, "--dry-run"], 2, "--dry-run is for stages", id="dry-run"),
        pytest.param(
            ["--csv", "x.csv", "--gold", "a", "--predicted", "b", "--output", "o"],
            65,
            "x.csv cannot be read: No such file or directory",
            id="no-file",
        ),
        pytest.param(
            [
                *("--csv", "x", "--gold", "a", "--predicted", "b", "--output", "o"),
                "--separator",
                ";",
                "--levels",
                "a,b",
            ],
            2,
            "--separator and --levels exclude each other",
            id="exclusive",
        ),
        pytest.param(
            [*NAMED, "--levels", "low"],
            2,
            "--levels takes two labels or more",
            id="levels",
        ),
        pytest.param(
            [*NAMED, "--dimension", "d"],
            2,
            "--dimension needs --item",
            id="dimension",
        ),
        pytest.param(
            [*NAMED, "--delimiter", "||"],
            2,
            "--delimiter takes one character",
            id="delimiter",
        ),
    ],
)
def test_wrong_words_are_refused_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    words: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["evaluate", *words]) == code
    assert message in caplog.text + capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not PUBLISHED.exists(), reason="set TUNEMILL_TEST_DATA to the folder of real data")
def test_published_predictions_give_the_published_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--gold", "trueCat", "--predicted", "predicted", "--id", "idCoding", "--output", str(tmp_path)]
    assert run(["evaluate", "--csv", str(PUBLISHED), *words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert (facts["rows"], round(facts["accuracy"], 4)) == (424, 0.7476)
    given = read_csv(PUBLISHED, Columns("trueCat", "predicted", id="idCoding"), Answers())
    wanted = metrics.classification_report(
        given.golds, given.answers, labels=list(given.labels), output_dict=True, zero_division=0
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["figures"]["per_class"]) == 20  # of the 21 topics one does not occur
    for one in report["figures"]["per_class"]:
        expected = wanted[one["label"]]
        assert (one["precision"], one["recall"], one["f1"], one["support"]) == pytest.approx(
            (expected["precision"], expected["recall"], expected["f1-score"], expected["support"])
        )
    assert facts["macro_f1"] == pytest.approx(metrics.f1_score(given.golds, given.answers, average="macro"))
    assert facts["cohen_kappa"] == pytest.approx(metrics.cohen_kappa_score(given.golds, given.answers))
    matrix = metrics.confusion_matrix(given.golds, given.answers, labels=list(given.labels))
    assert (np.array(report["figures"]["matrix"])[:, :-1] == matrix).all()

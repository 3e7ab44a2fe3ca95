"""The report of every form of task: its page in a real browser, its tables, and that nothing escapes."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tunemill.evaluate.baselines import Training
from tunemill.evaluate.comparison import Named, compare, write_comparison
from tunemill.evaluate.config import EvaluateConfig
from tunemill.evaluate.evaluate import judge
from tunemill.evaluate.figures import Interval, Judged
from tunemill.evaluate.learning import Trained, learning_curve, write_curve
from tunemill.evaluate.report import command_of, write
from tunemill.evaluate.tables import Column, Table, as_csv, as_latex, escaped, latex_file
from tunemill.progress import Progress

from .answered import TOPICS, predictions_of
from .browser import PROGRAM, Browser, browser

CONFIG = EvaluateConfig(bootstrap_rounds=100)
QUIET = Progress(quiet=True)
FETCHED = {
    "reference": f"base/tiny@sha256:{'1' * 64}",
    "kind": "base",
    "stage": "fetch",
    "tool_version": "0.1.0",
    "finished": "2026-01-02T03:04:05+00:00",
    "image": None,
    "llama_cpp": None,
    "published_against_parity": False,
    "inputs": {},
    "settings": {"hidden_size": 256},
}
LOST = {"reference": f"lost/data@sha256:{'2' * 64}", "stage": None}
GIVEN = {
    "role": "predictions",
    "reference": f"tiny-parts/predictions-f16@sha256:{'0' * 64}",
    "content": "c" * 64,
    "facts": {"rows": 120},
    "ancestors": [FETCHED, LOST],
}
SECTIONS = {
    "label": [
        "baselines",
        "classes",
        "confusion",
        "worst",
        "calibration",
        "agreement",
        "prevalence",
        "errors",
    ],
    "labels": ["classes", "worst", "calibration", "prevalence"],
    "levels": ["classes", "confusion", "worst", "dimensions", "calibration", "agreement", "prevalence"],
    "text": ["answers"],
    "numbers": ["answers"],
}


def judged(form: str) -> Judged:
    given = predictions_of(form)
    training = Training()
    if form == "label":
        training = Training(given.texts, tuple((gold,) for gold in given.golds), (None,) * len(given))
    return judge(given, training, np.arange(len(given)), CONFIG, QUIET)


def name(number: int) -> dict:
    return {**GIVEN, "reference": f"model-{number}/predictions@sha256:{str(number) * 64}"}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each form with its report, and one each for a comparison and a learning curve."""
    root = tmp_path_factory.mktemp("pages")
    for form in SECTIONS:
        write(root / form, judged(form), [GIVEN], {"seed": 42}, command_of([GIVEN], CONFIG), CONFIG)
    rights = (0.4, 0.6, 0.8)
    given = [predictions_of("label", right) for right in rights]
    groups = np.arange(len(given[0]))
    models = [Named(f"model {n}", one, name(n)) for n, one in enumerate(given)]
    write_comparison(root / "compare", compare(models, groups, CONFIG, QUIET), "tunemill compare …")
    trained = [Trained(0, None, given[0], name(0))]
    trained += [
        Trained(size, seed, given[place], name(place))
        for place, size in ((1, 50), (2, 400))
        for seed in (1, 2)
    ]
    trained[-1] = replace(trained[-1], report={"tfidf_accuracy": 0.5})
    learned = learning_curve(trained, groups, CONFIG)
    write_curve(root / "sweep", "tiny-parts", learned, trained, "tunemill sweep …")
    return root


@pytest.mark.parametrize("form", ["label", "labels"])
def test_the_page_says_how_far_off_probabilities_may_be(form: str, tmp_path: Path) -> None:
    said = "each probability is off by up to 0.0042 (max_pruned)"
    for pruned in (0.0, 0.0042):
        given = replace(predictions_of(form), most_pruned=pruned)
        found = judge(given, Training(), np.arange(len(given)), CONFIG, QUIET)
        write(tmp_path / str(pruned), found, [GIVEN], {"seed": 42}, command_of([GIVEN], CONFIG), CONFIG)
        assert (said in page(tmp_path, str(pruned)).read_text()) == (pruned > 0)
        record = json.loads((tmp_path / str(pruned) / "report.json").read_text())
        assert record["calibration"]["most_pruned"] == pruned


def page(pages: Path, folder: str) -> Path:
    (found,) = (pages / folder).glob("*.html")
    return found


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip("Chromium is not installed (Debian's package chromium)")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


EVERY = [*SECTIONS, "compare", "sweep"]
needs_latex = pytest.mark.skipif(
    not shutil.which("pdflatex"),
    reason="pdflatex is not installed (Debian's texlive-latex-recommended)",
)
CONTRAST = """
const linear = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(linear);
  return .2126 * r + .7152 * g + .0722 * b };
const behind = e => { const colour = getComputedStyle(e).backgroundColor;
  return colour == 'rgba(0, 0, 0, 0)' ? behind(e.parentElement) : colour };
const written = 'p, td, th, dt, dd, h1, h2, h3, a, summary, figcaption, small, svg text';
Math.min(...[...document.querySelectorAll(written)].map(e => {
  const own = getComputedStyle(e)[e.closest('svg') ? 'fill' : 'color'];
  const [a, b] = [light(own), light(behind(e))];
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) }))
"""
PLOTS = "[...document.querySelectorAll('svg[role=img]')]"


@pytest.mark.parametrize("folder", EVERY)
def test_a_browser_finds_nothing_to_complain_about(chromium: Browser, pages: Path, folder: str) -> None:
    opened = page(pages, folder)
    for width, media, scheme in ((360, "", "light"), (1000, "", "dark"), (750, "print", "light")):
        chromium.requests.clear()
        chromium.open(opened, width, media, scheme)
        assert chromium.complaints == []
        assert chromium.requests == [opened.as_uri()]
        assert chromium.ask("document.documentElement.scrollWidth") <= width
        assert chromium.ask(CONTRAST) >= 4.5  # WCAG 2.2, 1.4.3
    dark = "getComputedStyle(document.body).backgroundColor"
    assert chromium.ask(dark) == "rgb(255, 255, 255)"  # paper
    chromium.open(opened, scheme="dark")
    assert chromium.ask(dark) == "rgb(20, 24, 29)"


@pytest.mark.parametrize("folder", EVERY)
def test_every_plot_is_drawn_and_said_in_words(chromium: Browser, pages: Path, folder: str) -> None:
    chromium.open(page(pages, folder))
    drawn = chromium.ask(
        "[...document.querySelectorAll('svg[role=img]')].map(e => e.getBoundingClientRect().height)"
    )
    assert drawn
    assert min(drawn) > 40
    named = f"{PLOTS}.map(e => e.getAttribute('aria-labelledby').split(' ')"
    said = chromium.ask(f"{named}.map(i => document.getElementById(i).textContent))")
    assert all(title and len(description) > 20 for title, description in said)
    identifiers = chromium.ask("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(set(identifiers)) == len(identifiers)


@pytest.mark.parametrize("form", SECTIONS)
def test_every_section_that_applies_is_there(pages: Path, form: str) -> None:
    text = page(pages, form).read_text()
    found = re.findall(r'<section id="(\w+)">', text)
    assert found == ["figures", *SECTIONS[form], "provenance"]
    assert set(re.findall(r'<a href="#(\w+)">', text)) == set(found)
    assert "<script" not in text
    assert FETCHED["reference"] in text
    assert "not in this store" in text
    assert (
        "tunemill evaluate --run tiny-parts --input predictions=tiny-parts/predictions-f16@sha256:000" in text
    )


@pytest.mark.parametrize("form", SECTIONS)
def test_tables_hold_the_figures_of_the_record(pages: Path, form: str) -> None:
    record = json.loads((pages / form / "report.json").read_text())
    with (pages / form / "headline.csv").open(newline="") as source:
        rows = list(csv.DictReader(source))
    values = {float(row["value"]) for row in rows}
    assert {one["value"] for one in record["headlines"].values()} <= values
    assert float(rows[0]["value_low"]) <= float(rows[0]["value"]) <= float(rows[0]["value_high"])
    assert record["inputs"][0]["ancestors"][0] == FETCHED
    latex = (pages / form / "report.tex").read_text()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\bottomrule") >= 1
    assert not re.search(r"(?<!\\)[%&#_](?=.*\\\\)", latex.replace(" & ", " "))


def test_classes_are_a_line_each_with_their_counts(pages: Path) -> None:
    with (pages / "label" / "classes.csv").open(newline="") as source:
        rows = list(csv.DictReader(source))
    given = predictions_of("label")
    assert [row["label"] for row in rows] == list(TOPICS)
    assert [int(row["support"]) for row in rows] == [given.golds.count(topic) for topic in TOPICS]


def test_a_comparison_says_how_far_each_model_is_ahead(pages: Path) -> None:
    record = json.loads((pages / "compare" / "compare.json").read_text())
    first, middle, last = record["models"]
    assert first["minus_first"] is None
    gain = last["minus_first"]["differences"][0]["interval"]
    both = [model["judged"]["headlines"]["accuracy"]["value"] for model in (last, first)]
    assert gain["value"] == pytest.approx(both[0] - both[1])
    assert 0 < gain["low"] < gain["high"]
    assert last["minus_first"]["p_value"] < 0.001
    smaller, larger = sorted(
        (model["minus_first"] for model in (middle, last)), key=lambda pair: pair["p_value"]
    )
    assert smaller["holm_p_value"] == pytest.approx(2 * smaller["p_value"])
    assert larger["holm_p_value"] == pytest.approx(max(larger["p_value"], 2 * smaller["p_value"]))
    with (pages / "compare" / "differences.csv").open(newline="") as source:
        assert float(list(csv.DictReader(source))[1]["accuracy"]) == pytest.approx(gain["value"])


@pytest.mark.parametrize("form", SECTIONS)
def test_every_form_can_be_compared(tmp_path: Path, form: str) -> None:
    models = [Named(f"m{n}", predictions_of(form, right), name(n)) for n, right in enumerate((0.4, 0.8))]
    found = compare(models, np.arange(len(models[0].predictions)), CONFIG, QUIET)
    record = write_comparison(tmp_path, found, "tunemill compare …")
    text = (tmp_path / "compare.html").read_text()
    assert ('id="classes"' in text) == (form in ("label", "labels", "levels"))
    pair = record["models"][1]["minus_first"]
    assert pair["differences"][0]["interval"]["low"] > 0
    assert pair["only_first"] > pair["only_second"]


def test_a_learning_curve_is_the_mean_over_seeds(pages: Path) -> None:
    record = json.loads((pages / "sweep" / "sweep.json").read_text())
    assert record["train_sizes"] == [0, 50, 400]
    assert [len(scores) for scores in record["test_scores"]] == [1, 2, 2]
    means = [size["scores"][0]["mean"] for size in record["sizes"]]
    assert [mean["value"] for mean in means] == [np.mean(scores) for scores in record["test_scores"]]
    assert means[0]["high"] < means[2]["low"]
    assert record["baselines"] == {"tfidf": 0.5}
    assert "logistic regression, from all rows: 50.0 % at base" in page(pages, "sweep").read_text()
    assert [size["scores"][0]["std"] for size in record["sizes"]] == [None, 0, 0]


def test_texts_from_data_cannot_become_markup(tmp_path: Path) -> None:
    given = predictions_of("label")
    evil = '<img src=x onerror="x()"></title></style>'
    given = replace(given, texts=(evil,) * len(given), ids=tuple(f"{one}{evil}" for one in given.ids))
    found = judge(given, Training(), np.arange(len(given)), CONFIG, QUIET)
    write(tmp_path, found, [{**GIVEN, "facts": {evil: evil}}], {evil: evil}, evil, CONFIG)
    text = (tmp_path / "report.html").read_text()
    assert "<img" not in text
    assert text.count("</title></style>") == 0
    assert "&lt;img" in text


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        pytest.param("50% of A & B_1", r"50\% of A \& B\_1", id="signs"),
        pytest.param(
            "a\\b{c}~^#$", r"a\textbackslash{}b\{c\}\textasciitilde{}\textasciicircum{}\#\$", id="all"
        ),
        pytest.param("two\nlines", "two lines", id="lines"),
        pytest.param("[2] *x*", "{[}2] {*}x{*}", id="what-ends-a-line-before-it"),
        pytest.param(
            '<a> | "b" `c`',
            r"\textless{}a\textgreater{} \textbar{} {\char34}b{\char34} \textasciigrave{}c\textasciigrave{}",
            id="other-signs-in-the-font",
        ),
        pytest.param("a---b", "a-{}-{}-b", id="dashes"),
        pytest.param("e\u0301\x07", "\u00e9", id="accent-apart-and-control"),
    ],
)
def test_latex_takes_any_text(text: str, safe: str) -> None:
    assert escaped(text) == safe


def test_a_table_is_written_alike_for_spreadsheets_and_papers() -> None:
    columns = (Column("name", "Name", "name"), Column("gain", "Gain", "points"), Column("n", "Rows", "count"))
    table = Table("t", "A caption.", columns, (("a", Interval(-0.125, -0.25, 0.05), 3), ("b", None, 4)))
    assert as_csv(table) == "name,gain,gain_low,gain_high,n\na,-0.125,-0.25,0.05,3\nb,,,,4\n"
    assert r"a & $-$12.5 [$-$25.0, +5.0] & 3 \\" in as_latex(table)


def test_many_ranges_stand_below_their_figures_in_a_paper() -> None:
    columns = (Column("name", "Name", "name"), *(Column(f"c{n}", "Mean of it", "share") for n in range(3)))
    ranged = Interval(0.5, 0.25, 0.75)
    table = Table("t", "A caption.", columns, (("a", ranged, None, ranged), ("b", None, ranged, None)))
    small = r"{\footnotesize [0.250, 0.750]}"
    assert as_latex(table).splitlines()[6:15] == [
        r" & Mean & Mean & Mean \\",
        r"Name & of it & of it & of it \\",
        r"\midrule",
        r"a & 0.500 & \textendash{} & 0.500 \\",
        rf" & {small} &  & {small} \\",
        r"\addlinespace",
        r"b & \textendash{} & 0.500 & \textendash{} \\",
        rf" &  & {small} &  \\",
        r"\addlinespace",
    ]


def typeset(folder: Path, tables: Path, encoding: str = "OT1") -> str:
    """Return the log of pdflatex over an article with the tables and nothing but the packages they name."""
    named = re.findall(r"\\usepackage\{(.+)\}", tables.read_text().splitlines()[0])
    lines = [r"\documentclass{article}", rf"\usepackage[{encoding}]{{fontenc}}"]
    lines += [rf"\usepackage{{{one}}}" for one in named]
    lines += [r"\begin{document}", rf"\input{{{tables.name}}}", r"\end{document}"]
    (folder / tables.name).write_text(tables.read_text())
    (folder / "paper.tex").write_text("\n".join(lines))
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    made = subprocess.run(words, cwd=folder, capture_output=True, timeout=120)
    log = (folder / "paper.log").read_text(errors="replace")
    assert made.returncode == 0, log[-3000:]
    return log


@needs_latex
@pytest.mark.parametrize("folder", EVERY)
def test_papers_take_the_tables(pages: Path, tmp_path: Path, folder: str) -> None:
    (tables,) = (pages / folder).glob("*.tex")
    assert not re.search("Overfull|too large|undefined|Missing character", typeset(tmp_path, tables))


@needs_latex
@pytest.mark.parametrize("encoding", ["OT1", "T1"])
def test_papers_take_any_label_and_any_size(tmp_path: Path, encoding: str) -> None:
    odd = (
        "[1]",
        "*",
        "&",
        "%",
        "_",
        "#",
        "$",
        "{",
        "}",
        "~",
        "^",
        "\\",
        "<|>",
        '"E',
        "`x'",
        "--",
        "\N{EN DASH}",
    )
    names = (*odd, "e\u0301", "žluťoučký kůň", "Straße", "łódź", "½ €", *map(str, range(100)))
    columns = (
        Column("name", "[Name]", "name"),
        *(Column(f"c{n}", "*Mean of it", "share") for n in range(12)),
    )
    wide = Table("t", "[*] & %", columns, tuple((name, *(Interval(0.5, 0.25, 0.75),) * 12) for name in odd))
    tall = Table("u", "_ # $", columns[:2], tuple((name, 0.5) for name in names))
    (tmp_path / "odd.tex").write_text(latex_file([wide, tall]))
    (tmp_path / "made").mkdir()
    log = typeset(tmp_path / "made", tmp_path / "odd.tex", encoding)
    assert not re.search("Overfull|too large|undefined|Missing character", log)

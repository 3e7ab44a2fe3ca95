"""``tunemill sweep`` and ``tunemill compare``: which runs a sweep is made of, and both for real."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from parity.toy import make_base, row
from tunemill.commands.compare import parse_models
from tunemill.commands.sweep import lay_points, parse_seeds, parse_sizes, steps_of
from tunemill.recipe import Choice, Recipe, resolve
from tunemill.stages import known_keys, load_stage

Call = Callable[..., tuple[int, str, str]]


def recipe(*settings: str) -> Recipe:
    return resolve(Choice("tiny", "stdlib", settings=settings), known_keys())


def test_sizes_and_seeds_come_with_commas() -> None:
    assert parse_sizes("500,all, 0,100,100") == [0, 100, 500, None]
    assert parse_seeds("3,1,3", recipe()) == [3, 1]
    assert parse_seeds(None, recipe("seed=7")) == [7]


def test_the_point_of_all_rows_and_the_own_seed_is_the_run_itself() -> None:
    points = lay_points(recipe(), [0, 100, None], [42, 1])
    assert [(point.size, point.seed, point.recipe.names["run"]) for point in points] == [
        (0, None, "tiny-stdlib-base"),
        (100, 42, "tiny-stdlib-100-42"),
        (100, 1, "tiny-stdlib-100-1"),
        (None, 42, "tiny-stdlib"),
        (None, 1, "tiny-stdlib-all-1"),
    ]


def test_only_training_is_told_size_and_seed() -> None:
    base, point = lay_points(recipe(), [0, 100], [1])
    assert [step.stage for step in steps_of(base, "F16")] == ["convert", "infer", "evaluate"]
    stages = {step.stage: step.recipe.configure(load_stage(step.stage)) for step in steps_of(point, "Q4_K_M")}
    assert list(stages) == ["train", "merge", "convert", "quantize", "infer", "evaluate"]
    assert (stages["train"].max_train_samples, stages["train"].seed) == (100, 1)
    assert (stages["infer"].seed, stages["evaluate"].seed) == (42, 42)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(("sweep", "--train-sizes", "1"), "needs --run, or --model and --task", id="no run"),
        pytest.param(("sweep", "--model", "tiny", "--task", "stdlib"), "--train-sizes", id="no sizes"),
        pytest.param(("sweep", "--run", "a", "--train-sizes", "1,x"), "'x' is neither a number", id="size"),
        pytest.param(("sweep", "--run", "a", "--train-sizes", ","), "names nothing", id="nothing"),
        pytest.param(("sweep", "--run", "a", "--train-sizes", "1", "--seeds", "-1"), "'-1' is no", id="seed"),
        pytest.param(
            ("sweep", "--run", "a", "--train-sizes", "1", "--quant", "F16,Q8_0"),
            "one type",
            id="several types",
        ),
        pytest.param(
            ("sweep", "--run", "a", "--train-sizes", "1", "--set", "max_train_samples=3"),
            "is what a sweep varies",
            id="size set",
        ),
        pytest.param(("compare", "a/predictions"), "two predictions or more", id="one model"),
        pytest.param(("compare", "a=x/p", "a=y/p"), "two models are called a", id="same name"),
        pytest.param(("compare", "x/p", "a="), "'a=' is no [NAME=]REF", id="no reference"),
        pytest.param(("compare", "x/p", "y/p"), "has no 'x/p'", id="not there"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_runs(
    call: Call, words: tuple[str, ...], message: str
) -> None:
    code, stdout, stderr = call(*words)
    assert (code, stdout) == (2, "")
    assert message in stderr
    assert stderr.count("\n") == 1


def test_models_are_called_as_they_are_named() -> None:
    assert parse_models(["base=a/p@sha256:0", "b/p"]) == {"base": "a/p@sha256:0", "b/p": "b/p"}


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: Call) -> Call:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNEMILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TUNEMILL_QUIET", "1")
    return command_line


def write_recipes(folder: Path) -> None:
    make_base(folder / "base", 1)
    chance = random.Random(2)
    with (folder / "rows.csv").open("w", newline="") as target:
        writer = csv.writer(target)
        writer.writerow(["id", "text", "label"])
        for number in range(80):
            one = row("row", number, chance)
            writer.writerow([one["id"], one["text"], one["label"]])
    settings = "r: 4\nlearning_rate: 0.004\nmax_steps: 2\ndtype: float32\nuse_cpu: true\nparity_probes: 0\n"
    (folder / "small.yaml").write_text(f"model_name_or_path: base\ntarget_modules: all-linear\n{settings}")
    (folder / "halves.yaml").write_text(
        'dataset_name: rows.csv\nprompt: "{text}"\ntest_size: 0.25\nnear_duplicate_threshold: 1.0\n'
    )


SWEEP = ("sweep", "--model", "small.yaml", "--task", "halves.yaml", "--quant", "F16", "--json")


@pytest.mark.slow
def test_a_sweep_reuses_what_exists_and_its_models_can_be_compared(call: Call, tmp_path: Path) -> None:
    write_recipes(tmp_path)
    code, stdout, stderr = call(*SWEEP, "--train-sizes", "0,16")
    assert code == 0, stderr
    record = json.loads(stdout)
    assert record["train_sizes"] == [0, 16]
    assert record["rows"] == 21
    first = [one["predictions"] for one in record["trainings"]]
    assert Path(record["page"]).read_text().count("<svg") > 2
    told = json.loads(call(*SWEEP, "--train-sizes", "0,16,32", "--dry-run")[1])["stages"]
    assert {one["point"] for one in told if one["would"] == "run"} == {"32 rows, seed 42"}
    again = json.loads(call(*SWEEP, "--train-sizes", "16,0")[1])
    assert [one["predictions"] for one in again["trainings"]] == first
    code, _, stderr = call(*SWEEP, "--train-sizes", "60")
    assert code == 2
    assert "the train split has 59 rows, so say all instead of 60" in stderr
    code, stdout, stderr = call("compare", f"base={first[0]}", "small-halves-16-42/report-f16")
    assert code == 0, stderr
    table, page = stdout.splitlines()[:-1], Path(stdout.splitlines()[-1])
    assert [line.split()[0] for line in table] == ["model", "base", "small-halves-16-42/report-f16"]
    assert "base/small@sha256:" in page.read_text()
    assert json.loads((page.parent / "compare.json").read_text())["score"] == "accuracy"

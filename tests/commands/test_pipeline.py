"""How the pipeline command lays out its stages and shows what came of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunemill import cli
from tunemill.commands.pipeline import aligned, figures, lay_out, split_quants
from tunemill.errors import UsageError
from tunemill.recipe import Choice, resolve
from tunemill.stages import known_keys

SHARED = ["fetch", "prepare", "train", "merge", "convert"]


def laid_out(*quants: str, settings: tuple[str, ...] = ()) -> list[tuple[str, str | None]]:
    recipe = resolve(Choice("tiny", "stdlib", settings=settings), known_keys())
    return [(step.stage, step.quant) for step in lay_out(recipe, quants)]


@pytest.mark.parametrize(
    ("given", "quants"),
    [
        (("Q4_K_M",), ["Q4_K_M"]),
        (("F16,q4_k_m",), ["F16", "Q4_K_M"]),
        (("F16", "Q4_K_M, F16"), ["F16", "Q4_K_M"]),
    ],
)
def test_quantizations_come_with_commas_or_repeated(given: tuple[str, ...], quants: list[str]) -> None:
    assert split_quants(given) == quants


def test_what_is_shared_runs_once() -> None:
    steps = laid_out("Q8_0", "Q4_K_M")
    assert [stage for stage, quant in steps if quant is None] == SHARED
    assert [stage for stage, quant in steps if quant == "Q4_K_M"] == ["quantize", "infer", "evaluate"]


def test_the_converted_type_needs_no_quantizing() -> None:
    assert laid_out("F16")[len(SHARED) :] == [("infer", "F16"), ("evaluate", "F16")]
    assert ("quantize", "F16") in laid_out("F16", settings=("outtype=bf16",))


@pytest.mark.parametrize(("settings", "wanted"), [((), False), (("imatrix=true",), True)])
def test_an_importance_matrix_is_made_once_before_all_that_use_it(
    settings: tuple[str, ...], wanted: bool
) -> None:
    recipe = resolve(Choice(model="tiny", task="stdlib", settings=settings), known_keys())
    stages = [step.stage for step in lay_out(recipe, ["Q2_K", "IQ3_S"])]
    assert stages.count("imatrix") == wanted
    assert stages.count("quantize") == 2
    if wanted:
        assert stages.index("convert") < stages.index("imatrix") < stages.index("quantize")


def test_figures_stand_beside_their_baselines() -> None:
    facts = {
        "F16": {"rows": 1300, "accuracy": 0.71234, "majority_accuracy": 0.13, "tfidf_accuracy": 0.8},
        "Q4_K_M": {"rows": 1300, "accuracy": 0.7},
    }
    assert figures(facts) == [
        ("", "accuracy", "majority class", "TF-IDF", "rows"),
        ("F16", "0.712", "0.130", "0.800", "1300"),
        ("Q4_K_M", "0.700", "-", "-", "1300"),
    ]


def test_columns_are_aligned() -> None:
    assert aligned([("a", "bbb", "c"), ("aa", "b", "")]) == "a   bbb  c\naa  b"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNEMILL_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_dry_run_foretells_every_stage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pipeline", "--model", "tiny", "--task", "stdlib", "--quant", "F16,Q4_K_M", "--dry-run"]
    assert cli.run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["stages"]
    assert [entry["stage"] for entry in told] == [
        *SHARED,
        *("infer", "evaluate", "quantize", "infer", "evaluate"),
    ]
    assert {entry["would"] for entry in told} == {"run"}
    assert told[-1]["output"] == "tiny-stdlib/report-q4_k_m"
    assert not (folder / "cache").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param(("bootstrap_rounds=1",), "evaluate: bootstrap_rounds=1", id="last stage"),
        pytest.param(("output_dir=x",), "output_dir cannot be set", id="refused"),
    ],
)
def test_what_is_wrong_with_a_late_stage_is_said_before_the_first_runs(
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    settings: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(cli.log, "propagate", True)
    flags = [word for setting in settings for word in ("--set", setting)]
    assert cli.run(["pipeline", "--model", "tiny", "--task", "stdlib", *flags]) == 2
    assert message in caplog.text
    assert not (folder / ".tunemill").exists()


@pytest.mark.parametrize("given", [(), (",",), ("",)])
def test_no_quantization_is_a_usage_error(given: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="--quant F16,Q4_K_M"):
        split_quants(given)

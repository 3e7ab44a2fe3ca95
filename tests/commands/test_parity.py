"""``--publish-anyway``: where it is, and that it is a setting like any other from then on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunemill import cli

RECIPE = ("--model", "tiny", "--task", "stdlib", "--store", "store", "--dry-run", "--json")


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").mkdir()


@pytest.mark.parametrize("stage", ["merge", "convert", "quantize"])
def test_the_flag_sets_the_key(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, value, origin in (((), False, "default"), (("--publish-anyway",), True, "flag")):
        assert cli.run([stage, *RECIPE, *flags]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["config"]["publish_anyway"] == {"value": value, "origin": origin}


def test_the_pipeline_takes_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["pipeline", *RECIPE, "--publish-anyway"]) == 0
    assert [stage["would"] for stage in json.loads(capsys.readouterr().out)["stages"]] == ["run"] * 8


def test_stages_that_prove_nothing_have_no_such_flag(caplog: pytest.LogCaptureFixture) -> None:
    assert cli.run(["train", *RECIPE, "--publish-anyway"]) == 2
    assert "No such option '--publish-anyway'" in caplog.text

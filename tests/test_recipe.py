"""Recipes: where each value comes from, and what is said when one is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from toys import GROW, PLANT
from tunemill.errors import UsageError
from tunemill.recipe import Choice, available, describe, parse_yaml, resolve
from tunemill.stages import known_keys, load_stages
from tunemill.work import StageConfig

KNOWN = {*PLANT.config.model_fields, *GROW.config.model_fields, "learning_rate", "max_length"}


@pytest.fixture
def oak(tmp_path: Path) -> str:
    path = tmp_path / "oak.yaml"
    path.write_text("seed: 1\nsteps: 2\nnote: from the model\n")
    return str(path)


@pytest.fixture
def forest(tmp_path: Path) -> str:
    path = tmp_path / "forest.yml"
    path.write_text("steps: 3\nnote: from the task\n")
    return str(path)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_later_sources_win_and_every_value_has_its_origin(oak: str, forest: str, tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", "note: from the file\nseconds: 1e-1\n")
    found = resolve(Choice(oak, forest, file=file, settings=["seconds=0.2"]), KNOWN)
    assert {key: (setting.value, setting.origin) for key, setting in found.settings.items()} == {
        "seed": (1, f"file {oak}"),
        "steps": (3, f"file {forest}"),
        "note": ("from the file", f"file {file}"),
        "seconds": (0.2, "flag"),
    }
    assert found.names == {"model": "oak", "task": "forest", "run": "oak-forest"}
    assert found.origin("quant") == "default"


def test_the_last_of_equal_flags_wins() -> None:
    assert resolve(Choice(settings=["seed=1", "seed=2"]), KNOWN).settings["seed"].value == 2


def test_a_recipe_file_may_name_model_task_and_run(oak: str, tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", f"model: {oak}\nrun: other\nsteps: 7\n")
    found = resolve(Choice(file=file), KNOWN)
    assert found.names == {"model": "oak", "run": "other"}
    assert found.settings["steps"].value == 7
    assert resolve(Choice(file=file, run="flag"), KNOWN).names["run"] == "flag"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2.0e-4", 2e-4),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("", None),
        ("''", ""),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("[q_proj, 1, 2.5]", ["q_proj", 1, 2.5]),
        ("{a: 1e3}", {"a": 1000.0}),
        ("Q4_K_M", "Q4_K_M"),
        (".inf", float("inf")),
    ],
)
def test_values_are_yaml_1_2(text: str, value: Any) -> None:
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


@pytest.mark.parametrize("text", ["a: 1\na: 2", "!!python/object/apply:os.getcwd []", "a: [1", "\t- x: {"])
def test_what_is_no_plain_yaml_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


def test_all_unknown_keys_are_named_at_once_with_near_ones(tmp_path: Path) -> None:
    oak = write(tmp_path / "oak.yaml", "lerning_rate: 1\n")
    with pytest.raises(UsageError) as caught:
        resolve(Choice(oak, settings=["max_lenght=5", "zzzzzz=1"]), KNOWN)
    message = str(caught.value)
    assert f"'lerning_rate' (file {oak}): did you mean learning_rate?" in message
    assert "'max_lenght' (flag): did you mean max_length?" in message
    assert "'zzzzzz' (flag): 'tunemill STAGE --help' lists the keys" in message


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        pytest.param(Choice("lama3"), "unknown model 'lama3': did you mean llama3 or", id="near model"),
        pytest.param(Choice("zzz"), "there are gemma, llama2-7b", id="far model"),
        pytest.param(Choice(task="sdtlib"), "unknown task 'sdtlib': did you mean stdlib?", id="task"),
        pytest.param(Choice("no/such.yaml"), "no/such.yaml cannot be read: No such file", id="no file"),
        pytest.param(Choice(settings=["seed"]), "--set takes KEY=VALUE, got 'seed'", id="no value"),
        pytest.param(Choice(settings=["=1"]), "--set takes KEY=VALUE", id="no key"),
        pytest.param(Choice(settings=["seed=[1"]), r"--set seed=\[1: the value is not YAML", id="bad value"),
        pytest.param(Choice(settings=["run=x"]), "--set run=x: use --run instead", id="name as key"),
    ],
)
def test_a_wrong_choice_is_one_clear_line(choice: Choice, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(choice, KNOWN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("- a\n", "has to be a mapping", id="list"),
        pytest.param("1: 2\n", "has to be a mapping", id="key no text"),
        pytest.param("seed: 1\nseed: 2\n", "is not YAML: line 2: key 'seed' is given twice", id="twice"),
        pytest.param("seed: {\n", "is not YAML: line", id="cut off"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(Choice(write(tmp_path / "oak.yaml", text)), KNOWN)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert resolve(Choice(write(tmp_path / "oak.yaml", "# nothing\n")), KNOWN).settings == {}


def test_all_wrong_values_are_named_at_once_with_their_origin(oak: str) -> None:
    found = resolve(Choice(oak, settings=["steps=0", "seconds=soon"]), KNOWN)
    with pytest.raises(UsageError) as caught:
        found.configure(GROW)
    message = str(caught.value)
    assert "steps=0 (flag): input should be greater than or equal to 1" in message
    assert "seconds='soon' (flag): input should be a valid number" in message


def test_a_missing_value_says_what_it_is_for() -> None:
    prepare = load_stages()["prepare"]
    found = resolve(Choice("llama3", "cap"), known_keys())
    with pytest.raises(UsageError, match=r"dataset_name is not set \(.*\): add --set dataset_name=…"):
        found.configure(prepare)


def test_names_are_filled_in_lower_case(oak: str) -> None:
    found = resolve(Choice(oak, run="Trial", settings=["quant=Q8_0"]), KNOWN)
    assert found.format(GROW.output, found.configure(GROW)) == "trial/gguf-q8_0"


@pytest.mark.parametrize(
    ("template", "message"),
    [("{run}/data", "needs --run, or --model and --task"), ("base/{model}", "needs --model")],
)
def test_a_name_that_cannot_be_filled_in_says_what_it_needs(template: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(Choice(), KNOWN).format(template, StageConfig())


@pytest.mark.parametrize("model", available("models"))
def test_every_model_recipe_configures_fetch_and_train(model: str) -> None:
    stages, found = load_stages(), resolve(Choice(model), known_keys())
    fetch = found.configure(stages["fetch"])
    found.configure(stages["train"])
    revision = fetch.model_revision
    assert fetch.model_name_or_path == "made" or (len(revision) == 40 and int(revision, 16))
    assert 10 < len(describe("models", model)) < 90


@pytest.mark.parametrize("task", available("tasks"))
def test_every_task_recipe_configures_all_stages(task: str) -> None:
    found = resolve(Choice("tiny", task, settings=["dataset_name=rows.csv"]), known_keys())
    for stage in load_stages().values():
        found.configure(stage)
    assert 10 < len(describe("tasks", task)) < 160


def test_every_model_works_with_method_full_and_qlora() -> None:
    """LoRA settings of a recipe do not stand in the way of training every weight."""
    train = load_stages()["train"]
    for method in ("full", "qlora"):
        found = resolve(Choice("llama3", settings=[f"method={method}"]), known_keys())
        assert found.configure(train).method == method

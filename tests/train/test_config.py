"""Every SFTConfig and LoraConfig field is a key; those that may not be set say why."""

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from tunemill.train.config import OWN, REFUSED, STAGE, TrainConfig, library_fields
from tunemill.train.options import generate


def test_the_listed_fields_are_those_of_the_installed_libraries():
    listed = json.loads(generate.FILE.read_text("utf-8"))
    assert listed == generate.fields(), "run python -m tunemill.train.options.generate"


def test_every_field_of_both_libraries_is_a_key():
    names = {name for fields in library_fields().values() for name in fields}
    assert names <= set(TrainConfig.model_fields)
    assert {"learning_rate", "packing", "r", "target_modules", "use_rslora"} <= names
    assert set(REFUSED) <= names
    assert set(OWN) <= set(library_fields()["sft"])


def test_only_what_was_set_is_passed_on():
    config = TrainConfig(r=8, learning_rate=1e-3, max_grad_norm=None, seed=3)
    assert config.sft() == {"learning_rate": 1e-3, "max_grad_norm": None}
    assert config.lora() == {"r": 8}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_field_says_why(name):
    with pytest.raises(ValidationError) as error:
        TrainConfig(**{name: "something"})
    assert f"{name} cannot be set: {REFUSED[name]}" in str(error.value)


def test_all_refused_fields_are_named_at_once():
    with pytest.raises(ValidationError) as error:
        TrainConfig(push_to_hub=True, trust_remote_code=True, init_lora_weights="pissa_niter_4")
    assert all(name in str(error.value) for name in ("push_to_hub", "trust_remote_code", "init_lora_weights"))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"method": "prefix"}, id="method"),
        pytest.param({"dtype": "int8"}, id="dtype"),
        pytest.param({"seed": -1}, id="seed"),
        pytest.param({"report_to": "mlflow"}, id="report_to"),
        pytest.param({"max_length": 0}, id="max_length"),
        pytest.param({"learning_rat": 1}, id="unknown"),
    ],
)
def test_own_keys_are_typed(settings):
    with pytest.raises(ValidationError):
        TrainConfig(**settings)


def test_every_key_is_described():
    assert [name for name, field in TrainConfig.model_fields.items() if not field.description] == []


def test_how_a_run_checks_memory_is_no_part_of_its_identity():
    extra = TrainConfig.model_fields["memory_check"].json_schema_extra
    assert extra == {"identity": False}


def test_declaring_the_stage_imports_nothing_heavy():
    heavy = {"torch", "trl", "peft", "transformers"}
    code = f"import sys, tunemill.train.config; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_work_and_the_check_exist():
    assert callable(STAGE.load(STAGE.work))
    assert callable(STAGE.load(STAGE.check))

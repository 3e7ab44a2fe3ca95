"""Options are checked by the libraries' own types and constructors, all problems at once."""

import pytest

from tunemill.errors import ConfigurationError, UsageError
from tunemill.train.config import TrainConfig
from tunemill.train.options import validate


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"learning_rate": "1e-4", "num_train_epochs": 2, "warmup_steps": 0.1}, id="numbers"),
        pytest.param({"lr_scheduler_type": "cosine", "optim": "adamw_torch"}, id="enumerations"),
        pytest.param({"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}}, id="lora"),
        pytest.param({"target_modules": "all-linear", "modules_to_save": ["lm_head"]}, id="modules"),
        pytest.param({"method": "full", "r": "not read"}, id="full"),
        pytest.param({"method": "qlora"}, id="qlora"),
    ],
)  # fmt: skip
def test_fitting_options_pass(settings):
    validate.check(TrainConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        pytest.param({"learning_rate": "fast"}, "learning_rate='fast' does not fit trl.SFTConfig", id="type"),
        pytest.param({"r": 1.5}, "r=1.5 does not fit peft.LoraConfig", id="fraction"),
        pytest.param({"lr_scheduler_type": "cosin"}, "did you mean cosine?", id="near scheduler"),
        pytest.param({"optim": "adamw_troch"}, "did you mean adamw_torch", id="near optimizer"),
        pytest.param({"packing_strategy": "bdf"}, "did you mean bfd", id="near choice"),
        pytest.param({"bias": "some"}, "Input should be 'none', 'all' or 'lora_only'", id="literal"),
        pytest.param({"eval_strategy": "steps", "logging_steps": 0}, "refuses these options", id="together"),
        pytest.param({"bf16": True, "fp16": True}, "refuses these options", id="two precisions"),
        pytest.param({"r": 0}, "r=0 is no rank", id="rank"),
    ],
)
def test_unfit_options_are_named(settings, said):
    with pytest.raises(UsageError) as error:
        validate.check(TrainConfig(**settings))
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_all_problems_are_reported_one_per_line():
    with pytest.raises(UsageError) as error:
        validate.check(TrainConfig(learning_rate="fast", bias="some", packing="maybe", r="eight"))
    lines = str(error.value).splitlines()
    assert [line.split("=")[0] for line in lines] == ["learning_rate", "packing", "bias", "r"]


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(validate.PACKAGES, "wandb", "no_such_package")
    with pytest.raises(ConfigurationError, match=r"needs the package no_such_package: pip install") as error:
        validate.check(TrainConfig(report_to="wandb"))
    assert len(str(error.value).splitlines()) == 1


def test_values_reach_the_libraries(tmp_path):
    config = TrainConfig(learning_rate="1e-4", r=3, target_modules=["q_proj"], max_length=99, seed=5)
    sft = validate.sft_config(config, tmp_path, "bfloat16", "cpu")
    assert (sft.learning_rate, sft.max_length, sft.seed, sft.bf16, sft.use_cpu) == (1e-4, 99, 5, True, True)
    assert sft.report_to in ([], "none")
    assert sft.completion_only_loss is True
    lora = validate.lora_config(config)
    assert (lora.r, lora.target_modules) == (3, {"q_proj"})
    assert validate.lora_config(TrainConfig()).target_modules == "all-linear"

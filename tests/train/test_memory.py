"""The lower bound of memory, held against what a model of known size takes."""

import micro
import pytest

from tunemill.errors import BadDataError, ConfigurationError
from tunemill.train import memory
from tunemill.train.config import TrainConfig

PARAMETERS = 84_672  # of the micro model
LINEAR = 2 * (4 * 64 * 64 + 3 * 64 * 128)


@pytest.mark.parametrize(
    ("method", "dtype", "weights"),
    [
        pytest.param("lora", "float32", 4 * PARAMETERS, id="lora"),
        pytest.param("lora", "bfloat16", 2 * PARAMETERS, id="lora in bfloat16"),
        pytest.param("qlora", "bfloat16", int(0.516 * LINEAR + 2 * (PARAMETERS - LINEAR)), id="qlora"),
        pytest.param("full", "bfloat16", 0, id="full"),
    ],
)
def test_weights(base, method, dtype, weights):
    assert memory.estimate(base, TrainConfig(method=method), dtype).weights == weights


def test_what_is_trained(base):
    full = memory.estimate(base, TrainConfig(method="full"), "float32").training
    assert full == 16 * PARAMETERS
    lora = memory.estimate(base, TrainConfig(r=4), "float32").training
    assert lora == 16 * 8704  # what PEFT itself makes of it, see test_sft
    some = memory.estimate(base, TrainConfig(r=4, target_modules=["q_proj"]), "float32").training
    assert some == 16 * 2 * 4 * (64 + 64)
    assert memory.estimate(base, TrainConfig(method="full", optim="adamw_8bit"), "float32").training < full
    assert memory.estimate(base, TrainConfig(r=4, rank_pattern={"q": 1}), "float32").training == 0


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        pytest.param({"method": "full"}, "set method=lora or method=qlora", id="full"),
        pytest.param({"method": "lora"}, "set method=qlora", id="lora"),
        pytest.param(
            {"method": "qlora", "per_device_train_batch_size": 1}, "choose a smaller model", id="qlora"
        ),
        pytest.param(
            {"per_device_train_batch_size": 10**6}, "smaller per_device_train_batch_size", id="batch"
        ),
    ],
)
def test_says_what_to_change(base, settings, advice):
    config = TrainConfig(**settings)
    need = memory.estimate(base, config, "float32")
    memory.check_fits(need, need.total, "this machine", config)
    with pytest.raises(ConfigurationError, match=advice) as error:
        memory.check_fits(need, need.total - 1, "this machine", config)
    assert "\n" not in str(error.value)


def test_a_container_may_have_less_than_its_machine(tmp_path):
    assert memory._group_limit(tmp_path) > 1 << 60
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert memory._group_limit(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._group_limit(tmp_path) > 1 << 60


def test_free_and_peak_memory_are_plausible():
    free, where = memory.free_memory("cpu")
    assert 1 << 20 < free < 1 << 60
    assert where
    assert 1 << 20 < memory.peak_memory("cpu") < 1 << 50


def test_a_damaged_base_is_refused(tmp_path):
    base = micro.make_base(tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BadDataError):
        memory.estimate(base, TrainConfig(), "float32")

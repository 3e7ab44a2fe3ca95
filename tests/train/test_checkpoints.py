"""States without pickles: what goes in comes out, and nothing is dropped in silence."""

import json
import random

import numpy
import pytest
import torch

from tunemill.errors import BadDataError
from tunemill.train import checkpoints


def same(left, right):
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, numpy.ndarray):
        return left.dtype == right.dtype and numpy.array_equal(left, right)
    return type(left) is type(right) and left == right


def states():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    random_states = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "cpu": torch.get_rng_state(),
    }
    return {
        "optimizer.pt": optimizer.state_dict(),
        "scheduler.pt": schedule.state_dict(),
        "rng_state.pth": random_states,
    }


def test_real_states_come_back_as_they_were(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for name, state in states().items():
        torch.save(state, checkpoint / name)
    (checkpoint / "trainer_state.json").write_text("{}")
    (checkpoint / "training_args.bin").write_bytes(b"a pickle")
    (checkpoint / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/me/base", "r": 1}')
    checkpoints.export(checkpoint, tmp_path / "portable", "base/tiny")
    names = {path.name for path in (tmp_path / "portable").iterdir()}
    assert names == {"state.json", "state.safetensors", "trainer_state.json", "adapter_config.json"}
    config = json.loads((tmp_path / "portable" / "adapter_config.json").read_text())
    assert config == {"base_model_name_or_path": "base/tiny", "r": 1}
    checkpoints.restore(tmp_path / "portable", tmp_path / "back")
    for name, state in states().items():
        if name == "rng_state.pth":
            state = torch.load(checkpoint / name, weights_only=False)
        assert same(torch.load(tmp_path / "back" / name, weights_only=False), state), name


@pytest.mark.parametrize(
    "value",
    [
        pytest.param({0: {"a": (1, 2.5, None, True)}, "b": [[], {}]}, id="nested"),
        pytest.param({"x": float("inf")}, id="infinite"),
        pytest.param({"x": torch.zeros(0), "y": torch.tensor(1.5, dtype=torch.bfloat16)}, id="tensors"),
        pytest.param({"x": numpy.arange(3, dtype="uint32")}, id="array"),
    ],
)
def test_round_trip(value):
    tensors = {}
    text = json.dumps(checkpoints.encode(value, tensors))
    assert same(checkpoints.decode(json.loads(text), tensors), value)


def test_what_cannot_be_expressed_is_refused():
    with pytest.raises(BadDataError, match="cannot hold a function") as error:
        checkpoints.encode({"schedule": states}, {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("state.json", b"{", id="cut JSON"),
        pytest.param("state.json", b'{"optimizer.pt": ["tensor", "t9"]}', id="missing tensor"),
        pytest.param("state.json", b'{"optimizer.pt": ["object", "t0"]}', id="unknown kind"),
        pytest.param("state.safetensors", b"\0" * 7, id="cut tensors"),
    ],
)
def test_a_damaged_state_is_refused(tmp_path, name, content):
    (tmp_path / "checkpoint").mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "checkpoint" / "optimizer.pt")
    checkpoints.export(tmp_path / "checkpoint", tmp_path / "portable", "base/tiny")
    (tmp_path / "portable" / name).write_bytes(content)
    with pytest.raises(BadDataError, match="cannot be read") as error:
        checkpoints.restore(tmp_path / "portable", tmp_path / "back")
    assert "\n" not in str(error.value)

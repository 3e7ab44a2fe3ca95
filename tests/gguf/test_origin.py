"""A GGUF says where it comes from, in llama.cpp's own keys."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tunemill.errors import BadDataError
from tunemill.gguf.config import ConvertConfig
from tunemill.gguf.convert import convert
from tunemill.gguf.header import read_gguf
from tunemill.gguf.origin import write_origin

COMMIT = "8afb486c1db24fe5011ec46dfbe5b5dccdb575c2"
BASE = {"name": "some-lab/Llama-9", "license": "llama3", "commit": COMMIT, "reference": "base/m@sha256:1"}


@pytest.fixture
def this(work, model, data, tmp_path, converter):
    """A conversion whose inputs say where they are from."""
    carded = tmp_path / "carded"
    carded.mkdir()
    for file in data.iterdir():
        (carded / file.name).symlink_to(file)
    (carded / "card.json").write_text(json.dumps({"dataset": "some-lab/speeches", "revision": "1" * 40}))
    made = work(ConvertConfig(outtype="f32"), merged=model, data=carded)
    merged = replace(made.inputs["merged"], facts={"base": BASE})
    return replace(made, inputs={**made.inputs, "merged": merged})


def test_it_is_in_the_file(this):
    convert(this)
    found = read_gguf(this.output / "model-F32.gguf").metadata
    assert found["general.license"] == "llama3"
    assert found["general.base_model.count"] == 1
    assert found["general.base_model.0.name"] == "Llama-9"
    assert found["general.base_model.0.organization"] == "some-lab"
    assert found["general.base_model.0.version"] == COMMIT
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/some-lab/Llama-9"
    assert found["general.dataset.0.repo_url"] == "https://huggingface.co/some-lab/speeches"
    assert found["general.source.url"] == f"tunemill:{this.inputs['merged'].reference}"
    assert found["general.name"] == this.inputs["merged"].reference.partition("/")[0]


def test_nothing_is_made_up_where_nothing_is_known(this, tmp_path):
    merged = replace(this.inputs["merged"], facts={})
    data = replace(this.inputs["data"], path=tmp_path)
    write_origin(merged, data, tmp_path, tmp_path / "overrides.json")
    assert set(json.loads((tmp_path / "overrides.json").read_text())) == {
        "general.name",
        "general.source.url",
    }
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("name", ["made", "/models/mine", "./mine", "a/b/c"])
def test_a_name_that_is_not_the_hubs_gets_no_address(this, tmp_path, name):
    merged = replace(this.inputs["merged"], facts={"base": {"name": name}})
    write_origin(merged, this.inputs["data"], tmp_path, tmp_path / "overrides.json")
    [base] = json.loads((tmp_path / "overrides.json").read_text())["general.base_models"]
    assert set(base) == {"name"}


def test_a_damaged_card(this, tmp_path):
    (this.inputs["data"].path / "card.json").write_text("[")
    with pytest.raises(BadDataError, match=r"card\.json"):
        write_origin(this.inputs["merged"], this.inputs["data"], tmp_path, tmp_path / "overrides.json")

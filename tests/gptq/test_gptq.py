"""What can be known of GPTQ without a GPU, and the whole of it where there is one."""

from __future__ import annotations

import importlib.util
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pieces import TEMPLATE
from tunemill.errors import BadDataError, ConfigurationError
from tunemill.gptq import gptq as stage
from tunemill.gptq.calibration import calibration
from tunemill.gptq.config import STAGE, GptqConfig
from tunemill.progress import Progress
from tunemill.prompting import Prompting
from tunemill.work import Input, Work

PROMPTING = Prompting(TEMPLATE, "<s>", "</s>", True)


class Letters:
    """A tokenizer whose tokens are characters."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) for letter in text]


def save(directory, split, texts):
    rows = [{"prompt": [{"role": "user", "content": t}], "completion": "yes", "text": t} for t in texts]
    schema = None if rows else pa.schema([("prompt", pa.string()), ("completion", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), directory / f"{split}.parquet")


def spelled(row):
    return "".join(map(chr, row["input_ids"]))


def test_calibrates_on_training_rows_as_training_reads_them(tmp_path):
    save(tmp_path, "train", [f"train {number}" for number in range(100)])
    save(tmp_path, "test", ["test"])
    rows = calibration(tmp_path, PROMPTING, Letters(), 20)
    assert len(rows) == 20
    assert spelled(rows[0]) == "<s><|user|>train 0<|assistant|>yes</s>"
    assert spelled(rows[-1]) == "<s><|user|>train 95<|assistant|>yes</s>"
    assert all(len(row["input_ids"]) == len(row["attention_mask"]) for row in rows)
    assert rows == calibration(tmp_path, PROMPTING, Letters(), 20)
    assert len(calibration(tmp_path, PROMPTING, Letters(), 1000)) == 100


@pytest.mark.parametrize("how", ["none", "empty", "damaged"])
def test_without_training_rows(tmp_path, how):
    if how == "empty":
        save(tmp_path, "train", [])
    elif how == "damaged":
        (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadDataError, match=r"train\.parquet") as caught:
        calibration(tmp_path, PROMPTING, Letters(), 20)
    assert "\n" not in str(caught.value)


def test_refused_before_any_input_is_pulled_where_it_cannot_run():
    import torch

    if importlib.util.find_spec("gptqmodel") and torch.cuda.is_available():
        pytest.skip("this machine can run it")
    with pytest.raises(ConfigurationError, match=r"gptqmodel|optimum|CUDA") as caught:
        stage.check(GptqConfig())
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 78


def test_without_a_gpu(monkeypatch):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(stage, "PACKAGES", ("torch",))
    with pytest.raises(ConfigurationError, match="CUDA GPU"):
        stage.check(GptqConfig())


def test_declared_as_every_stage_is():
    assert STAGE.kind == "gptq"
    assert STAGE.output == "{run}/gptq"
    assert STAGE.load(STAGE.work) is stage.gptq


@pytest.mark.gpu
def test_a_small_model(tmp_path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    pytest.importorskip("gptqmodel", reason="the extra gptq is not installed")
    from transformers import LlamaConfig, LlamaForCausalLM

    from pieces import sentencepiece_model, tokenizer_config

    model, data, output = (tmp_path / name for name in ("model", "data", "output"))
    for directory in (model, data, output):
        directory.mkdir()
    (model / "tokenizer.model").write_bytes(sentencepiece_model())
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    shape = LlamaConfig(
        vocab_size=400, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(model)
    save(data, "train", [f"the text of file {number}" * 4 for number in range(64)])
    inputs = {
        role: Input(f"t/{role}@sha256:1", "1", role, path, {})
        for role, path in (("merged", model), ("data", data))
    }
    work = Work(
        GptqConfig(calibration_rows=32), inputs, output, tmp_path / "scratch", Progress(quiet=True), None
    )
    facts = stage.gptq(work)
    assert facts["bytes"] < facts["bytes_before"]
    assert facts["calibration_rows"] == 32

"""An adapter's GGUF applied by llama.cpp to its base's says what the merged model says."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tunemill.errors import BadDataError
from tunemill.gguf.config import ConvertConfig
from tunemill.gguf.convert import convert, convert_lora
from tunemill.infer.config import InferConfig
from tunemill.infer.predict import predict
from tunemill.merge.config import MergeConfig
from tunemill.merge.merge import merge
from tunemill.progress import Progress
from tunemill.work import Input, Work

LABELS = ("parse", "write", "list", "file", "value")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def stage(here):
    """Run a stage in a folder of its own; return its output as the next one's input."""

    def run(work, name, config, **inputs):
        output = here / name
        output.mkdir()
        made = Work(config, inputs, output, here / f"{name}-scratch", Progress(quiet=True), None)
        made.scratch.mkdir()
        return Input(f"t/{name}@sha256:{'a' * 64}", name, name, output, work(made))

    return run


@pytest.fixture(scope="module")
def made(here, made, data, stage, converter):
    """Base, adapter, and the three GGUFs that are compared."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear", use_rslora=True),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.05)
    model.save_pretrained(here / "adapter")
    base = Input("base/t@sha256:b", "b" * 64, "base", made, {})
    adapter = Input("t/adapter@sha256:c", "c" * 64, "adapter", here / "adapter", {})
    rows = Input("t/data@sha256:d", "d" * 64, "data", data, {})
    f32 = ConvertConfig(outtype="f32")
    merged = stage(merge, "merged", MergeConfig(), base=base, adapter=adapter)
    return {
        "base": stage(convert, "gguf-base", f32, merged=base, data=rows),
        "lora": stage(convert_lora, "gguf-lora", f32, base=base, adapter=adapter),
        "merged": stage(convert, "gguf-merged", f32, merged=merged, data=rows),
    }


@pytest.fixture(scope="module")
def asked(here, data):
    """Forty texts of the task with its labels."""
    directory = here / "asked"
    directory.mkdir()
    rows = pq.read_table(data / "train.parquet").to_pylist()[:40]
    rows = [row | {"id": str(number), "label": LABELS[0]} for number, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(rows), directory / "test.parquet")
    (directory / "task.json").write_text('{"form": "label"}')
    (directory / "labels.json").write_text(json.dumps([{"name": label} for label in LABELS]))
    return Input("t/data@sha256:e", "e" * 64, "data", directory, {})


def predictions(one):
    return pq.read_table(one.path / "predictions.parquet").to_pylist()


def test_it_agrees_with_the_merged_model(stage, made, asked):
    with_lora = stage(
        predict, "p-lora", InferConfig(lora=True), gguf=made["base"], lora=made["lora"], data=asked
    )
    merged = stage(predict, "p-merged", InferConfig(), gguf=made["merged"], data=asked)
    base = stage(predict, "p-base", InferConfig(), gguf=made["base"], data=asked)
    ours, theirs, without = (predictions(one) for one in (with_lora, merged, base))
    assert [row["label"] for row in ours] == [row["label"] for row in theirs]
    p, q = (np.array([row["probabilities"] for row in rows]) for rows in (theirs, ours))
    divergence = (p * np.log(p / q)).sum(axis=1)
    assert divergence.max() < 1e-3  # the merged weights are rounded to bfloat16 once more
    unadapted = np.array([row["probabilities"] for row in without])
    assert (p * np.log(p / unadapted)).sum(axis=1).mean() > 100 * divergence.mean()


def refused(stage, name, word, **inputs):
    with pytest.raises(BadDataError, match=word) as caught:
        stage(predict, name, InferConfig(lora=True), **inputs)
    assert "\n" not in str(caught.value)


def test_a_lora_on_another_model_is_refused_by_what_is_recorded(stage, made, asked):
    assert made["lora"].facts["model_content"] == made["base"].facts["model_content"]
    refused(stage, "p-2", "not trained on the model", gguf=made["merged"], lora=made["lora"], data=asked)


def test_a_lora_that_llama_cpp_cannot_apply(stage, made, asked, here):
    """Where nothing is recorded, llama.cpp compares names and shapes."""
    from gguf import GGUFWriter

    directory = here / "foreign"
    directory.mkdir()
    writer = GGUFWriter(directory / "model-LORA.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 1.0)
    for part, shape in (("a", (4, 100)), ("b", (100, 4))):
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{part}", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    foreign = Input("x/gguf@sha256:f", "f" * 64, "gguf", directory, {})
    refused(stage, "p-3", "cannot apply", gguf=made["base"], lora=foreign, data=asked)
    whole = replace(made["merged"], facts={})
    refused(stage, "p-4", "cannot apply", gguf=made["base"], lora=whole, data=asked)


def test_names_and_inputs():
    config = InferConfig(lora=True, shard_count=2, shard_index=1)
    assert config.naming() == {"shard": "-lora-1-of-2"}
    from tunemill.infer.config import STAGE

    assert STAGE.templates(config)["lora"] == "{run}/gguf-lora"
    joined = STAGE.templates(InferConfig(lora=True, shard_count=2))
    assert joined == {f"shard-{n}": f"{{run}}/predictions-{{quant}}-lora-{n}-of-2" for n in (0, 1)}

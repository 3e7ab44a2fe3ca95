"""The train stage on a micro model: what it learns, writes, repeats, resumes and refuses."""

import csv
import json
import shutil
import threading
from dataclasses import replace

import micro
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from tunemill.errors import BadDataError, ConfigurationError, Stopped, UsageError
from tunemill.train import examples
from tunemill.train.sft import train


def only_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base, data):
    """One run, never stopped."""
    work = micro.make_work(tmp_path_factory.mktemp("finished"), base, data)
    return work, train(work)


def test_writes_the_files_of_an_adapter(finished, base):
    work, _ = finished
    names = set(micro.files(work.output))
    assert names == {
        *("adapter_model.safetensors", "adapter_config.json", "prompting.json", "training.json"),
        *("metrics.csv", "metrics.svg", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("probes.json", "parity.npz"),
    }
    assert (work.output / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert json.loads((work.output / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_no_file_names_a_place_of_this_machine(finished, tmp_path_factory):
    work, _ = finished
    kept = micro.files(work.checkpoints.directory)
    place = str(tmp_path_factory.getbasetemp()).encode()
    assert kept
    assert [name for name, content in (micro.files(work.output) | kept).items() if place in content] == []
    config = json.loads((work.output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base/micro"


def test_facts_tell_what_was_trained(finished):
    work, facts = finished
    assert facts["steps"] == 6
    assert facts["base_content"] == work.inputs["base"].content
    assert facts["method"] == "lora"
    assert 0 < facts["trainable_parameters"] < facts["parameters"]
    assert facts["tokens_per_second"] > 0
    assert facts["peak_memory"] > 1 << 20
    assert facts["tokenization"] == {"add_special_tokens": False, "add_bos": False, "eos_token": "</s>"}


def test_metrics_have_a_row_for_each_step(finished):
    work, facts = finished
    with (work.output / "metrics.csv").open(newline="") as source:
        rows = list(csv.DictReader(source))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert float(rows[0]["loss"]) == facts["first_loss"]
    assert all(float(row["grad_norm"]) > 0 and float(row["learning_rate"]) > 0 for row in rows)
    assert (work.output / "metrics.svg").read_text().startswith("<?xml")


def test_checkpoints_hold_no_pickle(finished):
    work, _ = finished
    assert work.checkpoints.steps == [2, 4]
    names = {path.name for path in work.checkpoints.directory.rglob("*") if path.is_file()}
    assert {"state.json", "state.safetensors", "adapter_model.safetensors"} <= names
    assert not [name for name in names if name.endswith((".pt", ".pth", ".bin", ".pkl"))]


def test_the_same_seed_gives_the_same_bytes(finished, tmp_path, base, data):
    work, _ = finished
    again = micro.make_work(tmp_path, base, data)
    train(again)
    assert micro.files(again.output) == micro.files(work.output)
    other = micro.make_work(tmp_path, base, data, "other", seed=7)
    train(other)
    name = "adapter_model.safetensors"
    assert micro.files(other.output)[name] != micro.files(work.output)[name]


class StopAfter(threading.Event):
    """Is set after it was asked ``steps`` times, as by a signal in the middle of a step."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def is_set(self):
        if self.left:
            self.left -= 1
            if not self.left:
                self.set()
        return super().is_set()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="lora"),
        pytest.param(
            {"train_sampling_strategy": "group_by_length", "max_steps": 12}, id="second epoch, by length"
        ),
        pytest.param({"method": "full", "optim": "adamw_torch", "gradient_accumulation_steps": 2}, id="full"),
    ],
)
def test_a_stopped_run_resumes_to_the_same_bytes(tmp_path, base, data, settings):
    whole = micro.make_work(tmp_path, base, data, "whole", **settings)
    train(whole)
    stop_at = whole.config.max_steps - 1
    stopped = micro.make_work(tmp_path, base, data, "stopped", **settings)
    with pytest.raises(Stopped, match=f"stopped after step {stop_at} of {stop_at + 1}, which is saved"):
        train(replace(stopped, stop=StopAfter(stop_at)))
    assert stopped.checkpoints.steps[-1] == stop_at
    assert micro.files(stopped.output) == {}
    shutil.rmtree(stopped.scratch)  # another machine goes on
    stopped.scratch.mkdir()
    facts = train(stopped)
    assert facts["resumed_from_step"] == stop_at
    assert micro.files(stopped.output) == micro.files(whole.output)


def test_a_killed_run_resumes_from_its_last_checkpoint(finished, tmp_path, base, data):
    whole, _ = finished
    killed = micro.make_work(tmp_path, base, data)
    last = whole.checkpoints.directory / "4"
    shutil.copytree(last, tmp_path / "kept" / "4")
    killed.checkpoints.directory = tmp_path / "kept"
    killed.checkpoints.steps = [4]
    (killed.scratch / "trainer" / "checkpoint-5").mkdir(parents=True)  # not published: not trusted
    assert train(killed)["resumed_from_step"] == 4
    assert micro.files(killed.output) == micro.files(whole.output)


def test_a_damaged_checkpoint_is_refused(finished, tmp_path, base, data):
    whole, _ = finished
    work = micro.make_work(tmp_path, base, data)
    shutil.copytree(whole.checkpoints.directory / "4", tmp_path / "kept" / "4")
    (tmp_path / "kept" / "4" / "state.safetensors").write_bytes(b"nothing")
    work.checkpoints.directory, work.checkpoints.steps = tmp_path / "kept", [4]
    with pytest.raises(BadDataError, match="the checkpoint cannot be read") as error:
        train(work)
    only_line(error)


def test_the_loss_is_that_of_the_completion_alone(tmp_path, base, data):
    """The first loss, by TRL's path and by ours, is what the base says by plain arithmetic."""
    from tunemill.prompting import read_prompting
    from tunemill.tokenizer import load_tokenizer

    settings = {"max_steps": 1, "per_device_train_batch_size": 18, "lora_dropout": 0.0}
    work = micro.make_work(tmp_path, base, data, **settings)
    first = train(work)["first_loss"]
    smoothed = micro.make_work(tmp_path, base, data, "trl", **settings, loss_type="dft")
    train(smoothed)  # TRL's own path runs too

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    prompting, tokenizer = read_prompting(base), load_tokenizer(base)
    total, count = 0.0, 0
    for row in pyarrow.parquet.read_table(data / "train.parquet").to_pylist():
        prompt = tokenizer(prompting.prompt(row["prompt"]), add_special_tokens=False)["input_ids"]
        answer = prompting.completion(row["prompt"], row["completion"])
        completion = tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert completion[-1] == tokenizer.eos_token_id
        with torch.no_grad():
            scores = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        total -= sum(float(scores[place, token]) for place, token in zip(places, completion, strict=True))
        count += len(completion)
    assert first == pytest.approx(total / count, abs=1e-4)


def test_it_learns(tmp_path, base, data):
    facts = train(micro.make_work(tmp_path, base, data, method="full", max_steps=60, save_steps=100))
    assert facts["final_loss"] < 0.3 * facts["first_loss"]


def test_evaluates_on_validation_rows(tmp_path, base, data):
    work = micro.make_work(tmp_path, base, data, eval_strategy="steps", eval_steps=3)
    train(work)
    with (work.output / "metrics.csv").open(newline="") as source:
        evaluations = [row for row in csv.DictReader(source) if row["eval_loss"]]
    assert [int(row["step"]) for row in evaluations] == [3, 6]


def test_a_larger_draw_of_rows_holds_the_smaller_one_whatever_their_order():
    rows = [{"id": f"r{n}"} for n in range(40)]
    few, many = examples.draw(rows, 7, 1), examples.draw(rows, 20, 1)
    assert (len(few), len(many)) == (7, 20)
    assert [row for row in many if row in few] == few
    assert [row for row in rows if row in many] == many
    assert sorted(examples.draw(rows[::-1], 7, 1), key=rows.index) == few
    assert examples.draw(rows, 7, 2) != few
    assert examples.draw(rows, None, 1) == rows
    with pytest.raises(UsageError, match="max_train_samples=41 is more than the 40 rows"):
        examples.draw(rows, 41, 1)


def test_trains_on_the_rows_that_are_drawn(tmp_path, base, data):
    settings = {"max_train_samples": 4, "max_steps": -1, "num_train_epochs": 2, "parity_probes": 0}
    work = micro.make_work(tmp_path, base, data, **settings)
    assert train(work)["steps"] == 4  # two of two rows in each of two epochs


def test_qlora_trains_over_four_bits(tmp_path, base, data):
    work = micro.make_work(tmp_path, base, data, method="qlora", max_steps=2)
    facts = train(work)
    tensors = load_file(work.output / "adapter_model.safetensors")
    assert facts["method"] == "qlora"
    assert facts["parameters"] > 80_000  # unpacked, not counted as bytes
    assert any(float(value.abs().sum()) > 0 for name, value in tensors.items() if "lora_B" in name)


def test_full_training_keeps_the_base_dtype(tmp_path, data):
    base = micro.make_base(tmp_path / "half")
    tensors = {
        name: value.to(torch.bfloat16) for name, value in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    work = micro.make_work(tmp_path, base, data, method="full", max_steps=1)
    train(work)
    assert {t.dtype for t in load_file(work.output / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((work.output / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_loss_that_is_not_finite_names_the_step(tmp_path, data):
    base = micro.make_base(tmp_path / "bad")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadDataError, match="the loss is nan at step 1") as error:
        train(micro.make_work(tmp_path, base, data))
    only_line(error)


def test_bad_rows_are_refused_in_one_line(tmp_path, base, data):
    rows = pyarrow.parquet.read_table(data / "train.parquet")
    blank = {**micro.row(7, "rose", ""), "prompt": []}
    for name, table, said in (
        ("empty", rows.slice(0, 0), "no rows to train on"),
        ("lacking", rows.drop_columns(["completion"]), "train.parquet of the data lacks completion"),
        ("blank", pyarrow.Table.from_pylist([blank], rows.schema), "row r7 has no answer"),
    ):
        bad = tmp_path / name
        bad.mkdir()
        pyarrow.parquet.write_table(table, bad / "train.parquet")
        with pytest.raises(BadDataError, match=said) as error:
            train(micro.make_work(tmp_path, base, bad, f"{name} run"))
        only_line(error)
    (tmp_path / "empty" / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(BadDataError, match=r"train\.parquet of the data cannot be read") as error:
        train(micro.make_work(tmp_path, base, tmp_path / "empty", "cut run"))
    only_line(error)


def test_options_that_do_not_go_with_the_data_or_model_are_refused(tmp_path, base, data):
    with pytest.raises(BadDataError, match=r"row r0 has \d+ tokens, more than max_length=5") as error:
        train(micro.make_work(tmp_path, base, data, "long", max_length=5))
    only_line(error)
    unfit = micro.make_data(tmp_path / "unfit")
    with pytest.raises(UsageError, match="needs validation rows") as error:
        train(micro.make_work(tmp_path, base, unfit, "validation", eval_strategy="epoch"))
    only_line(error)
    with pytest.raises(UsageError, match=r"TRL refuses these options: .*[Tt]arget modules") as error:
        train(micro.make_work(tmp_path, base, data, "target", target_modules=["nowhere"]))
    only_line(error)


def test_a_truncated_base_is_refused(tmp_path, base, data):
    cut = tmp_path / "cut"
    shutil.copytree(base, cut)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[:-100])
    for check in (True, False):
        with pytest.raises(BadDataError) as error:
            train(micro.make_work(tmp_path, cut, data, f"run {check}", memory_check=check))
        only_line(error)


def test_what_clearly_does_not_fit_is_refused_before_loading(tmp_path, base, data, monkeypatch):
    monkeypatch.setattr("tunemill.train.memory.free_memory", lambda device: (100_000, "this machine"))
    with pytest.raises(ConfigurationError, match="set method=qlora, or a smaller model") as error:
        train(micro.make_work(tmp_path, base, data))
    only_line(error)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_trains_on_a_gpu_and_repeats(tmp_path, base, data, method):
    works = [
        micro.make_work(tmp_path, base, data, name, method=method, use_cpu=False, dtype="bfloat16")
        for name in ("first", "second")
    ]
    facts = [train(work) for work in works]
    assert facts[0]["device"] == "cuda"
    assert micro.files(works[0].output) == micro.files(works[1].output)

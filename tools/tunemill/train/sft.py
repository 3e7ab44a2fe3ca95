"""The train stage: supervised fine-tuning by TRL, with LoRA, QLoRA or all parameters.

Everything that can be refused is refused before weights are loaded: options, rows, memory. The
same seed, machine and thread count give the same bytes in every file, whether or not the run was
stopped and resumed; so what varies (times, memory) is among the facts, not in the files.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunemill.errors import BadDataError, ConfigurationError, Stopped, UsageError
from tunemill.files import disk_errors, write_json
from tunemill.prompting import read_prompting
from tunemill.tokenizer import load_tokenizer
from tunemill.train import adapters, device, examples, memory, metrics, ranks, reference
from tunemill.train.config import TrainBase
from tunemill.train.options import validate
from tunemill.train.quiet import quieten
from tunemill.work import Facts, Work

UNMERGED = (
    "use_dora",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
)


@dataclass(frozen=True)
class Place:
    """Where and in which type to compute."""

    device: str
    dtype: str


def train(work: Work[TrainBase]) -> Facts:
    """Fine-tune the base on the data and write adapter, metrics and records to ``work.output``.

    Raises:
        BadDataError: the base or the data are damaged, or the loss is not finite.
        ConfigurationError: the run does not fit into memory, or lacks a kernel or package.
        UsageError: the options do not go together.
        Stopped: ``work.stop`` was set; the state is saved.
    """
    quieten()
    os.environ.setdefault("WANDB_DIR", str(work.scratch))  # else it writes where the command was called
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data loader may fork
    config, base = work.config, work.inputs["base"]
    kind = device.device_type(config)
    place = Place(kind, device.compute_dtype(config, kind))
    prompting, tokenizer = read_prompting(base.path), load_tokenizer(base.path)
    splits = _read_splits(work, prompting, tokenizer)
    probes = reference.choose_probes(work, prompting, tokenizer)
    if config.memory_check:
        kept = adapters.kept_dtype(base.path, config, place.dtype)
        need = memory.estimate(base.path, config, kept)
        memory.check_fits(need, *memory.free_memory(kind), config)
    _say_plan(work, place, splits)
    with device.reproducible(config.deterministic), disk_errors(work.scratch):
        trainer = _build(work, place, splits, tokenizer)
        facts = _run(work, trainer, place)
        if work.group.rank == 0:
            facts |= reference.write_reference(work, trainer, probes)
    if work.group.rank == 0:
        with disk_errors(work.output):
            _write(work, trainer)
            prompting.save(work.output)
    tokenized = {"add_special_tokens": False, "add_bos": prompting.add_bos, "eos_token": prompting.eos_token}
    return facts | {"tokenization": tokenized}


def _read_splits(work: Work[TrainBase], prompting: Any, tokenizer: Any) -> dict[str, examples.Encoded]:
    """Return the training rows, and those of validation when evaluating."""
    config, data = work.config, work.inputs["data"].path
    wanted = ["train"]
    if str(config.sft().get("eval_strategy") or "no") != "no":
        wanted.append("validation")
    found = {}
    for split in wanted:
        rows = examples.read_split(data, split)
        if rows is None and split == "validation":
            raise UsageError("eval_strategy needs validation rows: set validation_size for the prepare stage")
        count = config.max_train_samples if split == "train" else None
        drawn = examples.draw(rows or [], count, config.seed)
        found[split] = examples.encode(drawn, prompting, tokenizer, config.max_length)
    return found


def _say_plan(work: Work[TrainBase], place: Place, splits: dict[str, examples.Encoded]) -> None:
    config, rows = work.config, splits["train"]
    work.progress.say(
        f"train: {config.method} in {place.dtype} on {place.device}, {len(rows.input_ids)} rows, "
        f"{rows.tokens} tokens"
    )
    lora = config.lora()
    if config.method == "full" and lora:
        work.progress.say(f"train: method=full has no adapter, so {', '.join(lora)} are not used")
    unmerged = [name for name in UNMERGED if lora.get(name)]
    if unmerged or lora.get("bias", "none") != "none":
        work.progress.say(
            f"train: merge takes plain LoRA and rsLoRA; it will refuse {', '.join(unmerged or ['bias'])}"
        )


def _build(work: Work[TrainBase], place: Place, splits: dict[str, examples.Encoded], tokenizer: Any) -> Any:
    """Load the model and put it into a trainer."""
    from tunemill.train.trainer import Trainer

    config = work.config
    local = work.scratch / "trainer"
    shutil.rmtree(local, ignore_errors=True)  # an unpublished checkpoint of a killed run is not trusted
    arguments = validate.sft_config(config, local, place.dtype, place.device)
    if place.device == "cpu":
        arguments.dataloader_pin_memory = False
    recipe_batch = arguments.per_device_train_batch_size
    _share_step(work, arguments)
    model = adapters.load_model(work.inputs["base"].path, config, place.dtype, place.device)
    validation = splits.get("validation")
    if arguments.ddp_find_unused_parameters is None:
        # Only a mixture of experts leaves weights unused in a step; to look for them takes time in each.
        arguments.ddp_find_unused_parameters = any("expert" in name for name, _ in model.named_parameters())
    try:
        return Trainer(
            model=model,
            args=arguments,
            train_dataset=splits["train"].dataset(),
            eval_dataset=validation.dataset() if validation else None,
            processing_class=tokenizer,
            peft_config=None if config.method == "full" else validate.lora_config(config),
            group=work.group,
            recipe_batch=recipe_batch,
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UsageError(f"TRL refuses these options: {' '.join(str(error).split())}") from error


def _share_step(work: Work[TrainBase], arguments: Any) -> None:
    """Let this process do its part of the recipe's step, on one device.

    Raises:
        UsageError: the rows of a step cannot be shared so that every process has the same.
    """
    size = work.group.size
    if size > 1 and arguments.train_sampling_strategy == "batch_rebalance":
        raise UsageError(
            "train_sampling_strategy=batch_rebalance makes other steps for each number of processes: "
            "set group_by_length, which keeps batches short too"
        )
    share = ranks.share_step(
        arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps, size
    )
    arguments.per_device_train_batch_size = share.batch
    arguments.gradient_accumulation_steps = share.accumulated
    if arguments.n_gpu > 1:
        work.progress.say(f"train: one process trains on one GPU of {arguments.n_gpu}; torchrun uses all")
        arguments._n_gpu = 1  # else transformers multiplies the batch by the GPUs it finds
    if size > 1:
        work.progress.say(
            f"train: {size} processes share the {share.step} rows of a step: "
            f"{share.accumulated} x {share.batch} each"
        )


def _run(work: Work[TrainBase], trainer: Any, place: Place) -> Facts:
    """Train to the end or until stopped; return what it took."""
    from transformers import PrinterCallback

    from tunemill.train.trainer import Keeper, resume_from

    checkpoint, first = resume_from(work.checkpoints, work.scratch, trainer)
    trained, total = adapters.count_parameters(trainer.model)
    work.progress.say(f"train: {trained:,} of {total:,} parameters are trained")
    started = time.monotonic()
    with work.progress.task("train", _steps(trainer), "steps") as task:
        task.advance(first)
        keeper = Keeper(trainer, task, work.checkpoints, work.scratch, work.stop, _name(work, "base"))
        trainer.add_callback(keeper)
        trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is the command's result
        _train(trainer, checkpoint)
    seconds = time.monotonic() - started
    state = trainer.state
    if keeper.stopped and state.global_step < state.max_steps:
        raise Stopped(f"stopped after step {state.global_step} of {state.max_steps}, which is saved")
    return {
        "steps": state.global_step,
        "resumed_from_step": first,
        "trainable_parameters": trained,
        "parameters": total,
        "device": place.device,
        "dtype": place.dtype,
        "threads": _threads(),
        "processes": work.group.size,
        "tokens_per_second": round(work.group.total([trainer.tokens])[0] / max(seconds, 1e-9), 1),
        "seconds": round(seconds, 1),
        "peak_memory": memory.peak_memory(place.device),
    } | _identity(work, trainer)


def _train(trainer: Any, checkpoint: Path | None) -> None:
    import torch

    try:
        with ranks.lost_processes():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise ConfigurationError(
            f"the GPU's memory is full at step {trainer.state.global_step + 1}: set a smaller "
            "per_device_train_batch_size, or gradient_checkpointing=true"
        ) from error
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise ConfigurationError(
            f"a kernel has no deterministic form here; set deterministic=false: {str(error).splitlines()[0]}"
        ) from error


def _steps(trainer: Any) -> int:
    loader = trainer.get_train_dataloader()
    return int(trainer.set_initial_training_values(trainer.args, loader)[-1])


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _identity(work: Work[TrainBase], trainer: Any) -> Facts:
    """What is the same for every run of this action, and so may stand in the files."""
    losses = [row["loss"] for row in trainer.record if "loss" in row]
    tail = losses[-max(1, len(losses) // 10) :]
    if not losses:
        raise BadDataError("there was no step to train: set num_train_epochs or max_steps")
    return {
        "base": _name(work, "base"),
        "base_content": work.inputs["base"].content,
        "data": _name(work, "data"),
        "data_content": work.inputs["data"].content,
        "method": work.config.method,
        "quantization": _quantization(work.config),
        "global_batch": trainer.rows_per_step,
        "first_loss": losses[0],
        "final_loss": sum(tail) / len(tail),
    }


def _quantization(config: TrainBase) -> Facts | None:
    """What qlora held the base in: the merge tries it too."""
    if config.method != "qlora":
        return None
    return {name: getattr(config, name) for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")}


def _name(work: Work[TrainBase], role: str) -> str:
    """The artifact's name alone: its digest changes with the time it was published."""
    return work.inputs[role].reference.split("@")[0]


def _write(work: Work[TrainBase], trainer: Any) -> None:
    base = work.inputs["base"]
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapters.forget_place(model, _name(work, "base"))
    adapters.save_result(model, work.output, work.config.method, adapters.base_dtype(base.path))
    adapters.copy_tokenizer(base.path, work.output)
    metrics.write_metrics(work.output, trainer.record)
    trained, total = adapters.count_parameters(model)
    write_json(
        work.output / "training.json",
        {
            **_identity(work, trainer),
            "steps": trainer.state.global_step,
            "trainable_parameters": trained,
            "parameters": total,
            "sft": {name: str(value) for name, value in work.config.sft().items()},
            "lora": {name: str(value) for name, value in work.config.lora().items()},
        },
    )

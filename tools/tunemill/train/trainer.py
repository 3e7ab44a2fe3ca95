"""TRL's SFTTrainer with what a stage needs around it: records, checkpoints, stopping, cheap loss.

The training itself is TRL's. Added are a record of every step (so that a resumed run leaves the
same table as one that was never stopped), checkpoints published as they are made, an end within
the step when asked to stop, batches of like length that depend on seed and epoch alone, and a
loss that computes logits only where a completion is.

This module imports torch, transformers and TRL; only ``sft`` imports it.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback
from trl import SFTTrainer

from tunemill.errors import BadDataError
from tunemill.files import write_json
from tunemill.progress import Task
from tunemill.train import checkpoints
from tunemill.work import Checkpoints

RECORD = "record.json"
CHUNK_BATCHES = 50  # batches whose rows are sorted together: less padding, and still a new order each epoch


class Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that records each step and refuses a loss that is not finite."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.record: list[dict[str, float]] = []
        """One row a step: step, epoch, loss, learning_rate, grad_norm; and evaluations."""
        self.tokens = 0
        """Tokens read since this process began to train."""
        self._row: dict[str, float] = {}
        self._compact = self._can_be_compact()

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Train on one batch.

        Raises:
            BadDataError: the loss is not finite; names the step.
        """
        self.tokens += int(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum())
        loss = super().training_step(model, inputs, num_items_in_batch)
        value = float(loss)
        if not isfinite(value):
            raise BadDataError(
                f"the loss is {value} at step {self.state.global_step + 1}: set a smaller learning_rate, or "
                "dtype=float32, and look at the data around it"
            )
        self._row["loss"] = self._row.get("loss", 0.0) + value
        return loss

    def finish_row(self) -> float:
        """Close the record of a step and return its loss."""
        state = {"step": self.state.global_step, "epoch": round(float(self.state.epoch or 0), 6)}
        self.record.append(state | self._row)
        self._row = {}
        return self.record[-1]["loss"]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean negative log-likelihood of the batch's completion tokens."""
        if return_outputs or not self._compact:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        targets = inputs["labels"][:, 1:]
        kept = (targets != -100).any(dim=0).nonzero().squeeze(1)
        arguments = {key: value for key, value in inputs.items() if key != "labels"}
        logits = model(**arguments, use_cache=False, logits_to_keep=kept).logits
        goal = targets[:, kept].flatten()
        scores = logits.flatten(0, 1).float()
        total = torch.nn.functional.cross_entropy(scores, goal, ignore_index=-100, reduction="sum")
        counted = int((goal != -100).sum())
        self._note(scores.detach(), goal, counted)
        return total / max(1, int(num_items_in_batch if num_items_in_batch is not None else counted))

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Write no model card: it would hold paths of this machine, and the artifact has provenance."""

    def _can_be_compact(self) -> bool:
        """Whether TRL would project every position to the vocabulary, and we need not.

        TRL's fused loss skips the prompt's positions only where Triton runs; on a CPU they cost
        more than all layers of a small model.
        """
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return (
            self.args.device.type != "cuda"
            and self.args.loss_type == "nll"
            and self.label_smoother is None
            and not self.aux_loss_enabled
            and "logits_to_keep" in inspect.signature(base.forward).parameters
        )

    def _note(self, scores: torch.Tensor, goal: torch.Tensor, counted: int) -> None:
        """Keep TRL's own running metric, which its log averages."""
        mode = "train" if self.model.training else "eval"
        correct = int(((scores.argmax(-1) == goal) & (goal != -100)).sum())
        self._metrics[mode]["mean_token_accuracy"].append(correct / max(1, counted))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._row["grad_norm"] = float(norm)
        self._row["learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        return norm

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroups([len(ids) for ids in rows["input_ids"]], size, seed)


class LengthGroups(Sampler[int]):
    """Batches of rows of like length, in an order that seed and epoch determine.

    transformers' own sampler draws from the global generator, so a resumed epoch would get
    another order; and it serves long rows before short ones.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths = lengths
        self.batch = batch
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        batches = []
        for start in range(0, len(order), self.batch * CHUNK_BATCHES):
            chunk = order[start : start + self.batch * CHUNK_BATCHES]
            chunk.sort(key=self.lengths.__getitem__)
            batches += [chunk[n : n + self.batch] for n in range(0, len(chunk), self.batch)]
        full = [batch for batch in batches if len(batch) == self.batch]
        rest = [batch for batch in batches if len(batch) < self.batch]  # last, or batches would shift
        for n in torch.randperm(len(full), generator=generator).tolist():
            yield from full[n]
        for batch in rest:
            yield from batch

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; called by accelerate."""
        self.epoch = epoch


@dataclass
class Keeper(TrainerCallback):  # type: ignore[misc]
    """Shows progress, publishes checkpoints, and ends the run when asked to."""

    trainer: Trainer
    task: Task
    saved: Checkpoints
    scratch: Path
    stop: Event
    base: str
    """Name of the base, written where PEFT would write its path."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the step; if told to stop, save and end."""
        self.task.advance(1, f"loss {self.trainer.finish_row():.3f}")
        if self.stop.is_set():
            control.should_save = state.global_step < state.max_steps
            control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Add an evaluation to the record."""
        names = ("eval_loss", "eval_mean_token_accuracy")
        found = {name: float(metrics[name]) for name in names if name in (metrics or {})}
        self.trainer.record.append({"step": state.global_step} | found)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Publish the checkpoint that was just written, unless the run is complete."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.global_step < state.max_steps:
            publish(self, checkpoint, state.global_step)
        shutil.rmtree(checkpoint, ignore_errors=True)


def publish(keeper: Keeper, checkpoint: Path, step: int) -> None:
    """Publish a Trainer checkpoint with the record so far, free of pickles and local paths."""
    portable = keeper.scratch / "publish"
    shutil.rmtree(portable, ignore_errors=True)
    checkpoints.export(checkpoint, portable, keeper.base)
    write_json(portable / RECORD, keeper.trainer.record)
    keeper.saved.save(portable, step)
    shutil.rmtree(portable)


def resume_from(saved: Checkpoints, scratch: Path, trainer: Trainer) -> tuple[Path | None, int]:
    """Return the newest published checkpoint as the Trainer reads it, and its step; None and 0 if none.

    Raises:
        BadDataError: it is damaged.
    """
    pulled, ready = scratch / "pulled", scratch / "resume"
    for directory in (pulled, ready):
        shutil.rmtree(directory, ignore_errors=True)
    step = saved.latest(pulled)
    if step is None:
        return None, 0
    checkpoints.restore(pulled, ready)
    trainer.record = json.loads((ready / RECORD).read_text("utf-8"))
    shutil.rmtree(pulled)
    return ready, step

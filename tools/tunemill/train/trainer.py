"""TRL's SFTTrainer with what a stage needs around it: records, checkpoints, stopping, cheap loss.

The training itself is TRL's. Added are a record of every step (so that a resumed run leaves the
same table as one that was never stopped), checkpoints published as they are made, an end within
the step when asked to stop, batches of like length that depend on seed and epoch alone, a loss that
computes logits only where a completion is, and, for several processes, the order of rows and the
losses that one process would have.

This module imports torch, transformers and TRL; only ``sft`` imports it.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from math import isfinite
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import TrainerCallback
from trl import SFTTrainer

from tunemill.errors import BadDataError
from tunemill.files import write_json
from tunemill.group import Alone, Group
from tunemill.progress import Task
from tunemill.train import checkpoints
from tunemill.work import Checkpoints

RECORD = "record.json"
CHUNK_BATCHES = 50  # batches whose rows are sorted together: less padding, and still a new order each epoch


class Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that records each step and refuses a loss that is not finite.

    ``recipe_batch`` is the batch that one process would compute; of a group's smaller ones as many.
    """

    def __init__(self, group: Group | None = None, recipe_batch: int = 0, **arguments: Any) -> None:
        self.group = group or Alone()
        self._recipe_batch = recipe_batch
        self._order: Any = None
        super().__init__(**arguments)
        if self.group.size > 1:
            self.train_dataset: Any = with_blank(self.train_dataset)
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

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, over all processes."""
        own: int = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return own * self.group.size

    def finish_row(self, stop: bool) -> bool:
        """Close the record of a step with the loss of all its rows; return whether any process stops."""
        loss, stops = self.group.total([self._row["loss"], float(stop)])
        self._row["loss"] = loss / self.group.size
        state = {"step": self.state.global_step, "epoch": round(float(self.state.epoch or 0), 6)}
        self.record.append(state | self._row)
        self._row = {}
        return stops > 0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean negative log-likelihood of the batch's completion tokens."""
        if return_outputs or not self._compact:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        targets = inputs["labels"][:, 1:]
        kept = (targets != -100).any(dim=0).nonzero().squeeze(1)
        kept = kept if len(kept) else kept.new_zeros(1)  # nothing but blank rows
        arguments = {key: value for key, value in inputs.items() if key != "labels"}
        logits = model(**arguments, use_cache=False, logits_to_keep=kept).logits
        goal = targets[:, kept].flatten()
        scores = logits.flatten(0, 1).float()
        total = torch.nn.functional.cross_entropy(scores, goal, ignore_index=-100, reduction="sum")
        counted = int((goal != -100).sum())
        self._note(scores.detach(), goal, counted)
        if num_items_in_batch is None:
            return total / max(1, counted)
        # Gradients are averaged over the processes, and the items may be counted over all of them.
        scale = self.group.size if self.args.average_tokens_across_devices else 1
        return total / max(1, int(num_items_in_batch)) * scale

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

    def begin_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch.

        accelerate does so too, but not for a process of several whose epoch was resumed in the middle.
        """
        if self._order is not None:
            self._order.set_epoch(epoch)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        by_length = self.args.train_sampling_strategy == "group_by_length"
        if self.group.size == 1 and not by_length:
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths = [len(ids) for ids in rows["input_ids"]]
        if self.group.size == 1:
            return LengthGroups(lengths, self.rows_per_step, seed)
        blank = len(lengths) - 1
        order: Sampler[int] = Shuffled(blank, seed)
        if by_length:
            order = LengthGroups(lengths[:blank], self.rows_per_step, seed)
        elif self.args.train_sampling_strategy == "sequential":
            order = SequentialSampler(range(blank))
        dropped = blank % self._recipe_batch if self.args.dataloader_drop_last else 0
        self._order = Padded(order, dropped, self.args.train_batch_size * self.group.size, blank)
        return self._order


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


class Shuffled(Sampler[int]):
    """All rows in the order that accelerate draws for one process."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.rows, generator=generator).tolist()

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch


class Padded(Sampler[int]):
    """An order whose length several processes can share: less its last rows, or with blank ones.

    accelerate would fill up the last batches with the epoch's first rows, and train on those twice.
    """

    def __init__(self, order: Any, dropped: int, multiple: int, blank: int) -> None:
        self.order = order
        self.kept = len(order) - dropped
        self.multiple = multiple
        self.blank = blank

    def __len__(self) -> int:
        return self.kept + -self.kept % self.multiple

    def __iter__(self) -> Iterator[int]:
        yield from islice(self.order, self.kept)
        yield from repeat(self.blank, -self.kept % self.multiple)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)


def with_blank(rows: Any) -> Any:
    """Return a dataset with one more row, the shortest one again, of which no token counts."""
    from datasets import concatenate_datasets

    lengths = list(map(len, rows["input_ids"]))
    shortest = rows.select([lengths.index(min(lengths))])
    uncounted = {"completion_mask": 0, "assistant_masks": 0, "labels": -100}
    blank = shortest.map(
        lambda row: {name: [value] * len(row[name]) for name, value in uncounted.items() if name in row},
        features=rows.features,
        load_from_cache_file=False,
    )
    return concatenate_datasets([rows, blank])


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
    stopped: bool = False
    """Whether this process or another one of its group was told to stop."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Choose the order of the epoch."""
        self.trainer.begin_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the step; if any process was told to stop, save and end."""
        self.stopped = self.trainer.finish_row(self.stop.is_set())
        self.task.advance(1, f"loss {self.trainer.record[-1]['loss']:.3f}")
        if self.stopped:
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
            gather_random_states(self.trainer.group, checkpoint)
            if self.trainer.group.rank == 0:
                publish(self, checkpoint, state.global_step)
        shutil.rmtree(checkpoint, ignore_errors=True)


def gather_random_states(group: Group, checkpoint: Path) -> None:
    """Put the state of every process's generators into the checkpoint of process 0.

    Each process writes its own, to a disk that the others may not see.
    """
    if group.size == 1:
        return
    own = (checkpoint / f"rng_state_{group.rank}.pth").read_bytes()
    for rank, content in enumerate(group.gather(own)):
        if group.rank == 0:
            (checkpoint / f"rng_state_{rank}.pth").write_bytes(content)


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

"""Several processes train one model: how they meet, and how a step's rows are shared among them.

torchrun starts them and tells each where to meet. Gradients travel by NCCL between GPUs and by gloo
between CPUs (transformers wraps the model for it); all that Tunemill says to the others itself, by gloo.

A recipe means the same training on any number of processes: the rows of a step, ``per_device_train_batch_size
x gradient_accumulation_steps``, are shared among them. So neither the result, but for rounding, nor the
action key depends on how many there are, and a checkpoint of four is gone on from by two.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from tunemill.errors import TransientError, TunemillError, UsageError
from tunemill.train.config import TrainBase
from tunemill.train.device import device_type

TIMEOUT_SECONDS = 1800  # transformers' own: process 0 may publish a large checkpoint meanwhile
LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out")
"""What the messages of torch's errors have in them when a process cannot be reached."""


@dataclass(frozen=True)
class Ranks:
    """The processes that torchrun started."""

    rank: int
    local_rank: int
    size: int
    channel: Any
    """torch's process group for what is on the CPU."""

    def gather(self, value: Any) -> list[Any]:
        """Return what every process gave, by rank.

        Raises:
            TransientError: another process is gone.
        """
        import torch.distributed

        found: list[Any] = [None] * self.size
        with lost_processes():
            torch.distributed.all_gather_object(found, value, group=self.channel)
        return found

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the sums over the processes, in double precision.

        Raises:
            TransientError: another process is gone.
        """
        import torch

        sums = torch.tensor(list(values), dtype=torch.float64)
        with lost_processes():
            torch.distributed.all_reduce(sums, group=self.channel)
        return [float(value) for value in sums]


@contextmanager
def joined(config: TrainBase) -> Iterator[Ranks]:
    """Meet the other processes, and part from them when the block ends, unless one of them is lost.

    Raises:
        TransientError: they cannot be met, or one of them is lost within the block.
    """
    import torch.distributed

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = device_type(config) == "cuda"
    timeout = timedelta(seconds=int(config.sft().get("ddp_timeout") or TIMEOUT_SECONDS))
    # accelerate counts cores by psutil where this is unset, which finds none in some containers.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    if on_gpu:
        torch.cuda.set_device(local_rank)
    with lost_processes():
        try:
            torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
        except (torch.distributed.DistError, ValueError, OSError) as error:
            raise TransientError(
                f"process {rank} of {size} cannot meet the others: {_first_line(error)}; "
                "see that every node runs torchrun with the same --rdzv-endpoint, and reaches it"
            ) from error
        channel = torch.distributed.new_group(backend="gloo", timeout=timeout) if on_gpu else None
        try:
            yield Ranks(rank, local_rank, size, channel)
        except TransientError:
            raise  # another process is gone: parting from it might never end
        except TunemillError:
            torch.distributed.destroy_process_group()  # else torch aborts at the exit: no exit code
            raise
    torch.distributed.destroy_process_group()


@contextmanager
def lost_processes() -> Iterator[None]:
    """Turn torch's errors about a process that is gone into one line.

    Raises:
        TransientError: one is.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in LOST):
            raise
        raise TransientError(
            f"another process of the training is gone ({_reason(error)}): its own message says why; "
            "run all of them again to go on from the last checkpoint"
        ) from error


@dataclass(frozen=True)
class Share:
    """What one process does of a step."""

    batch: int
    """Rows computed at once, never more than the recipe's."""
    accumulated: int
    """Batches of a step."""
    step: int
    """Rows of a step, over all processes."""


def share_step(batch: int, accumulated: int, size: int) -> Share:
    """Share the rows of a step among ``size`` processes, as few batches as fit ``batch`` each.

    Raises:
        UsageError: they cannot be shared evenly.
    """
    step = batch * accumulated
    if step % size:
        raise UsageError(
            f"the {step} rows of a step (per_device_train_batch_size={batch} x "
            f"gradient_accumulation_steps={accumulated}) cannot be shared evenly by {size} processes: "
            f"set one of the two so that {size} divides them"
        )
    own = step // size
    largest = max(rows for rows in range(1, min(batch, own) + 1) if own % rows == 0)
    return Share(largest, own // largest, step)


def _reason(error: BaseException) -> str:
    """Return the first sentence of an error, without the place in torch's sources before it."""
    return re.sub(r"^\[\S*\] *", "", _first_line(error)).partition(". ")[0]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

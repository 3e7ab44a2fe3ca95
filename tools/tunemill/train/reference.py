"""What all later stages are compared with: the answers of the model that training ended with.

The probe set is chosen before any weight is loaded, and put to the very model in memory after the last
step: base and adapter apart, the base in 4 bits for qlora. See ``tunemill.parity``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunemill.parity import hf
from tunemill.parity.probes import Probes, Rendering, choose
from tunemill.prompting import Prompting
from tunemill.task import FILE, read_task
from tunemill.train import examples
from tunemill.train.config import TrainBase
from tunemill.work import Facts, Work


def choose_probes(work: Work[TrainBase], prompting: Prompting, tokenizer: Any) -> Probes | None:
    """Choose rows of validation, else of training, never of the test; None if none are wanted.

    Raises:
        BadDataError: the data are damaged, or the prompts begin with BOS twice.
    """
    count, data = work.config.parity_probes, work.inputs["data"].path
    if not count:
        work.progress.say("train: parity_probes=0, so no later stage can compare its model with this one")
        return None
    split = "validation"
    rows = examples.read_split(data, split)
    if not rows:
        split = "train"
        rows = examples.read_split(data, split) or []
    rendering = Rendering(prompting, hf.reader(tokenizer), len(tokenizer))
    return choose(rows, split, _labels(data), rendering, count)


def write_reference(work: Work[TrainBase], trainer: Any, probes: Probes | None) -> Facts:
    """Put the probes to the trained model; write them and its answers into the output.

    Raises:
        BadDataError: the model computes values that are no numbers.
    """
    if probes is None:
        return {"parity": {"verdict": "off"}}
    # accelerate's wrapper would compute in 16 bits.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    with work.progress.task("train (parity)", len(probes.probes), "probes") as task:
        found = hf.measure_model(model, probes, task.advance)
    probes.save(work.output)
    found.save(work.output)
    return {"parity": {"verdict": "reference", "probes": len(probes.probes), "probe_set": probes.digest}}


def _labels(data: Path) -> Sequence[str]:
    """Return the names of which an answer is one; none where answers are free or name several.

    Raises:
        BadDataError: the task is not as prepare writes it.
    """
    task = read_task(data) if (data / FILE).exists() else None
    return task.labels if task and task.form == "label" else ()

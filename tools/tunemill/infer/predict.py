"""The infer stage: every row of a split gets a label with its probability, or a free answer.

A row that cannot be asked (no text, too long, refused by the template) keeps its place with the
reason in ``error``; nothing is guessed for it and nothing cut off.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import llama_cpp

from tunemill import progress
from tunemill.errors import BadDataError, ConfigurationError
from tunemill.files import write_json
from tunemill.ggufs import find_gguf
from tunemill.infer import free_text, one_label, several_labels
from tunemill.infer.calibration import calibration_of, content_free_rows
from tunemill.infer.classify import Question
from tunemill.infer.config import LORA, InferConfig
from tunemill.infer.engine import Size
from tunemill.infer.idle import refuse_idle
from tunemill.infer.join import join
from tunemill.infer.model import Model
from tunemill.infer.pool import Pool
from tunemill.infer.probe import check_loads
from tunemill.infer.questions import Asker, Refused
from tunemill.infer.reprove import reprove
from tunemill.infer.result import CONTENT_FREE, DESCRIPTION, PREDICTIONS, RECORD, refuse_none_predicted, tally
from tunemill.infer.rows import Answer, Blocks, Row, Rows
from tunemill.infer.run import Run
from tunemill.prompting import read_prompting
from tunemill.task import Task, read_task
from tunemill.work import Facts, Work

T = TypeVar("T")
R = TypeVar("R")

FORMS = {"label": one_label.answer, "labels": several_labels.answer, "text": free_text.answer}
"""How each form of task is answered: ``(run, questions, numbers)`` to each question's number and answer."""


def predict(work: Work[InferConfig]) -> Facts:
    """Predict one split of the ``data`` input, or a shard of it, with the ``gguf`` input; or join shards.

    Raises:
        BadDataError: an input is not what it has to be, or no row at all can be predicted.
        ConfigurationError: the model or the memory is not fit for the settings.
        Stopped: the stop event was set; finished blocks are kept.
    """
    if work.config.joins:
        return join(work)
    config, data = work.config, work.inputs["data"].path
    rows = Rows(data, config.split, config.limit)
    blocks = Blocks(work.scratch / "blocks", _identity(work))
    own = (config.block_rows, config.shard_index or 0, config.shard_count)
    count = rows.count_of(*own)
    started, before = time.monotonic(), min(count, blocks.finished * config.block_rows)
    with opened(work) as (run, hosts), work.progress.task("infer", count, "rows") as task:
        task.skip(before)
        left = islice(rows.blocks(*own), blocks.finished, None)
        for (number, block), asked in _ahead(left, lambda each: run.asker.ask(each[1])):
            blocks.add(block, _answered(run, block, asked, number * config.block_rows, task))
    seconds = time.monotonic() - started
    blocks.join(work.output / PREDICTIONS)
    for name in DESCRIPTION:
        shutil.copyfile(data / name, work.output / name)
    facts = {**_same_in_all_shards(run.task, config), **tally(blocks.tables())}
    if config.shard_count == 1:
        refuse_none_predicted(blocks.tables(), facts)
    calibration = {CONTENT_FREE: run.calibration.record()} if run.calibration else {}
    write_json(work.output / RECORD, {**facts, **calibration, **_identity(work)})
    return {**facts, **hosts, "rows_per_second": round((count - before) / seconds, 1) if seconds else 0.0}


@contextmanager
def opened(work: Work[InferConfig]) -> Iterator[tuple[Run, Facts]]:
    """Load the model; yield what rows are answered with, and what was found out about this host.

    Raises:
        BadDataError: an input is not what it has to be.
        ConfigurationError: the model or the memory is not fit for the settings.
    """
    config, data, gguf = work.config, work.inputs["data"].path, work.inputs["gguf"].path
    wanted = read_task(data)
    refuse_idle(config, wanted)
    content_free = _content_free(config, wanted, data)
    path, prompting, lora = find_gguf(gguf), read_prompting(gguf), _lora(work)
    check_loads(path, lora)
    size = Size(0, config.n_batch, config.flash_attn, config.n_parallel)
    with (
        Model(path, config.n_gpu_layers, lora) as model,
        Pool(model, size, config.n_threads, work.stop) as pool,
    ):
        asker = Asker(model, prompting, wanted, _longest(config, model), config.max_new_tokens)
        hosts = reprove(work, model)
        yield _calibrated(Run(config, model, pool, asker, wanted), content_free), hosts


def _lora(work: Work[InferConfig]) -> Path | None:
    """Return the LoRA to apply.

    Raises:
        BadDataError: it was made from an adapter of another base than the model's.
    """
    if not work.config.lora:
        return None
    model, lora = work.inputs["gguf"], work.inputs[LORA]
    wanted, given = lora.facts.get("model_content"), model.facts.get("model_content")
    if None not in (wanted, given) and wanted != given:
        raise BadDataError(
            f"{lora.reference} was not trained on the model of {model.reference}: give the GGUF of its base"
        )
    return find_gguf(lora.path)


def answer_block(run: Run, rows: Sequence[Row], first: int, task: progress.Task) -> list[Answer]:
    """Answer consecutive rows, the first of them number ``first`` of the split."""
    return _answered(run, rows, run.asker.ask(rows), first, task)


def _ahead(items: Iterator[T], prepare: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Yield each item with what is prepared of it, while the next one is being prepared."""
    with ThreadPoolExecutor(1, thread_name_prefix="ask") as worker:
        waiting: tuple[T, Future[R]] | None = None
        for item in items:
            following = (item, worker.submit(prepare, item))
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting:
            yield waiting[0], waiting[1].result()


def _answered(
    run: Run, rows: Sequence[Row], asked: Sequence[Question | Refused], first: int, task: progress.Task
) -> list[Answer]:
    answers: list[Answer] = [
        Answer(error=question.reason) if isinstance(question, Refused) else Answer() for question in asked
    ]
    places = [place for place, question in enumerate(asked) if not isinstance(question, Refused)]
    task.advance(len(rows) - len(places))
    questions = [question for question in asked if not isinstance(question, Refused)]
    if questions:
        numbers = [first + place for place in places]
        for number, answer in FORMS[run.task.form](run, questions, numbers):
            place = places[number]
            answers[place] = _adjusted(run, answer, rows[place].dimension)
            task.advance(1)
    return answers


def _adjusted(run: Run, answer: Answer, dimension: str | None) -> Answer:
    return run.calibration.applied(answer, dimension) if run.calibration else answer


def _content_free(config: InferConfig, wanted: Task, data: Path) -> list[Row]:
    """Return the prompts to calibrate with; none if nothing is calibrated.

    Raises:
        BadDataError: prepare left no such prompts.
    """
    if config.calibration == "none":
        return []
    return content_free_rows(data, wanted.dimensions)


def _calibrated(run: Run, rows: Sequence[Row]) -> Run:
    if not rows:
        return run
    with progress.Progress(quiet=True).task("calibrate") as task:
        answers = answer_block(run, rows, 0, task)
    return replace(run, calibration=calibration_of(run.task.labels, rows, answers))


def _longest(config: InferConfig, model: Model) -> int:
    if config.n_ctx > model.trained_context > 0:
        raise ConfigurationError(
            f"n_ctx={config.n_ctx} is more than the {model.trained_context} tokens that "
            f"{model.path.name} was trained for: lower it, or leave it 0"
        )
    return config.n_ctx or model.trained_context


def _settings(config: InferConfig) -> dict[str, Any]:
    """Return what decides a row's prediction; so not, which rows are this shard's."""
    fields = type(config).model_fields
    without = {
        name for name, field in fields.items() if (field.json_schema_extra or {}) == {"identity": False}
    }
    return config.model_dump(exclude={*without, "shard_count", "shard_index"})


def _identity(work: Work[InferConfig]) -> dict[str, Any]:
    config = work.config
    made_of = {f"{role}_content": one.content for role, one in sorted(work.inputs.items())}
    shard = {"shard": {"index": config.shard_index, "count": config.shard_count}}
    sharded = shard if config.shard_count > 1 else {}
    return {**made_of, "config": _settings(config), "llama_cpp": llama_cpp.__version__, **sharded}


def _same_in_all_shards(wanted: Task, config: InferConfig) -> Facts:
    return {
        "form": wanted.form,
        "split": config.split,
        "labels": len(wanted.labels),
        "llama_cpp": llama_cpp.__version__,
    }

"""The infer stage: every row of a split gets a label with its probability, or a free answer.

A row that cannot be asked (no text, too long, refused by the template) keeps its place with the
reason in ``error``; nothing is guessed for it and nothing cut off.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp

from tunemill.errors import BadDataError, ConfigurationError
from tunemill.files import write_json
from tunemill.ggufs import find_gguf
from tunemill.infer import classify, generate
from tunemill.infer.config import LORA, InferConfig
from tunemill.infer.engine import Size
from tunemill.infer.join import join
from tunemill.infer.model import Model
from tunemill.infer.pool import Pool
from tunemill.infer.probe import check_loads
from tunemill.infer.questions import Asker, Refused
from tunemill.infer.reprove import reprove
from tunemill.infer.result import LABELS, PREDICTIONS, RECORD, refuse_none_predicted, tally
from tunemill.infer.rows import Answer, Blocks, Row, Rows
from tunemill.progress import Task
from tunemill.prompting import read_prompting
from tunemill.work import Facts, Work


@dataclass(frozen=True)
class Run:
    """What every block of one inference needs."""

    config: InferConfig
    model: Model
    pool: Pool
    asker: Asker
    labels: tuple[str, ...]


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
    labels = read_labels(data)
    rows = Rows(data, config.split, config.limit)
    path = find_gguf(work.inputs["gguf"].path)
    prompting = read_prompting(work.inputs["gguf"].path)
    lora = _lora(work)
    check_loads(path, lora)
    blocks = Blocks(work.scratch / "blocks", _identity(work))
    own = (config.block_rows, config.shard_index or 0, config.shard_count)
    count = rows.count_of(*own)
    started, before = time.monotonic(), min(count, blocks.finished * config.block_rows)
    size = Size(0, config.n_batch, config.flash_attn)
    with (
        Model(path, config.n_gpu_layers, lora) as model,
        Pool(model, size, config.n_threads, work.stop) as pool,
        work.progress.task("infer", count, "rows") as task,
    ):
        longest = _longest(config, model)
        run = Run(
            config, model, pool, Asker(model, prompting, labels, longest, config.max_new_tokens), labels
        )
        hosts = reprove(work, model)
        task.advance(before)
        for place, (number, block) in enumerate(rows.blocks(*own)):
            if place >= blocks.finished:
                blocks.add(block, answer_block(run, block, number * config.block_rows, task))
    seconds = time.monotonic() - started
    blocks.join(work.output / PREDICTIONS)
    shutil.copyfile(data / LABELS, work.output / LABELS)
    facts = {**_same_in_all_shards(labels, config), **tally(blocks.tables())}
    if config.shard_count == 1:
        refuse_none_predicted(blocks.tables(), facts)
    write_json(work.output / RECORD, {**facts, **_identity(work)})
    return {**facts, **hosts, "rows_per_second": round((count - before) / seconds, 1) if seconds else 0.0}


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


def answer_block(run: Run, rows: Sequence[Row], first: int, task: Task) -> list[Answer]:
    """Answer consecutive rows, the first of them number ``first`` of the split."""
    asked = [run.asker.ask(row) for row in rows]
    answers: list[Answer] = [
        Answer(error=question.reason) if isinstance(question, Refused) else Answer() for question in asked
    ]
    places = [place for place, question in enumerate(asked) if not isinstance(question, Refused)]
    task.advance(len(rows) - len(places))
    questions = [question for question in asked if not isinstance(question, Refused)]
    if questions:
        make = _labels if run.labels else _texts
        for place, answer in zip(places, make(run, questions, [first + p for p in places]), strict=True):
            answers[place] = answer
            task.advance(1)
    return answers


def read_labels(data: Path) -> tuple[str, ...]:
    """Return the task's label names, none for free answers.

    Raises:
        BadDataError: the files are malformed, or a task with labels has fewer than two.
    """
    task, listed = _read(data / "task.json", dict), _read(data / "labels.json", list)
    labels = tuple(str(label.get("name", "")) for label in listed if isinstance(label, dict))
    if task.get("form") not in ("label", "text"):
        raise BadDataError(f"task.json has the form {task.get('form')!r}, expected 'label' or 'text'")
    if task["form"] == "text":
        return ()
    if len(labels) != len(listed) or not all(labels):
        raise BadDataError('labels.json: every entry needs a "name"; run prepare again')
    if len(set(labels)) < 2 or len(set(labels)) != len(labels):
        raise BadDataError(
            f"labels.json names {len(labels)} labels, {len(set(labels))} of them different: "
            "a task of form 'label' needs at least two, each once"
        )
    return labels


def _labels(run: Run, questions: Sequence[classify.Question], _numbers: Sequence[int]) -> Iterator[Answer]:
    largest = max(classify.cells(question) for question in questions)
    prefix = common_beginning([question.prompt for question in questions])
    run.pool.share(prefix, len(prefix) + max(run.config.n_batch, largest))
    for _, scores in classify.score(run.pool, questions, len(run.labels)):
        shares = classify.probabilities(scores)
        best = int(shares.argmax())
        yield Answer(run.labels[best], float(shares[best]), tuple(shares.tolist()))


def _texts(run: Run, questions: Sequence[classify.Question], numbers: Sequence[int]) -> Iterator[Answer]:
    config = run.config
    sampling = generate.Sampling(config.max_new_tokens, config.temperature, config.seed)
    prompts = [
        generate.Prompt(number, question.prompt) for number, question in zip(numbers, questions, strict=True)
    ]
    prefix = common_beginning([prompt.tokens for prompt in prompts])
    run.pool.share(prefix, generate.cells(prompts, sampling))
    for found in generate.generate(run.pool, run.model, prompts, sampling):
        yield Answer(found.text, ended=found.ended)


def common_beginning(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the tokens all prompts begin with, short of any prompt's last one."""
    first, last = min(prompts), max(prompts)
    shortest = min(len(prompt) for prompt in prompts) - 1
    same = 0
    while same < shortest and first[same] == last[same]:
        same += 1
    return first[:same]


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


def _same_in_all_shards(labels: Sequence[str], config: InferConfig) -> Facts:
    return {
        "form": "label" if labels else "text",
        "split": config.split,
        "labels": len(labels),
        "llama_cpp": llama_cpp.__version__,
    }


def _read(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadDataError(f"{path.name} cannot be read ({error}): run prepare again") from error
    if not isinstance(value, kind):
        raise BadDataError(
            f"{path.name} holds no JSON {'object' if kind is dict else 'list'}: run prepare again"
        )
    return value

"""The merge stage: an adapter folded into its base, without loading either into memory.

The result is a plain Hugging Face directory: the base's weights with the adapter's change computed
in float32 and rounded once, and the tokenizer and prompting files that training used. An adapter
trained on another base is refused before anything is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from tunemill.errors import BadDataError
from tunemill.files import disk_errors, need_space, write_json
from tunemill.merge.adapter import Adapter, read_adapter
from tunemill.merge.config import MergeConfig, adapter_role
from tunemill.merge.four_bit import FourBit, held
from tunemill.merge.measured import Choice, choose_base
from tunemill.merge.parity import prove_parity
from tunemill.merge.places import HEAD
from tunemill.merge.plan import Plan, plan_merge
from tunemill.merge.rewrite import copy_range, write_shard
from tunemill.merge.settings import CONFIG
from tunemill.merge.several import Joined, join, one
from tunemill.parity.gate import unproved
from tunemill.weights import INDEX, Header, read_headers
from tunemill.work import Facts, Input, Work

MOST_THREADS = 8  # more only wait for the disk
OF_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "prompting.json",
)
"""Training may have added tokens or set the template, so its files win over the base's."""
TRAINING_ONLY = ("metrics.csv", "metrics.svg", "training.json", "probes.json", "parity.npz")


def merge(work: Work[MergeConfig]) -> Facts:
    """Write the merged model into ``work.output`` and prove that it answers as the trained one did.

    Raises:
        BadDataError: an input is damaged, the adapter was trained on another base, or parity is lost.
        TransientError: the disk is full.
    """
    facts = _fold(work) | {"base": _origin(work.inputs["base"])}
    if work.config.adapters:
        return facts | unproved("merge", "several adapters were never one model", work.progress)
    return facts | prove_parity(work)


def _fold(work: Work[MergeConfig]) -> Facts:
    base, inputs = work.inputs["base"], _adapters(work)
    checked = [_check_base(base, adapter) for adapter in inputs]
    proved = all(checked)
    if not work.config.adapters and not (inputs[0].path / CONFIG).exists():
        return _pass_through(work, inputs[0].path) | {"base_proved": proved}
    config = _model_config(base)
    headers, model_type = read_headers(base.path), str(config.get("model_type"))
    adapters = [read_adapter(adapter.path) for adapter in inputs]
    joined = join(adapters, work.config, headers) if work.config.adapters else one(adapters[0])
    plan = plan_merge(headers, joined.changes, config, joined.name, joined.keep_tied)

    def fold(output: Path, four_bit: FourBit | None) -> None:
        chosen = plan if four_bit is None else plan.on(four_bit, held(headers, model_type))
        need_space(output, sum(shard.size for shard in plan.shards))
        _copy_small_files(base.path, inputs[0].path, output)
        _write_shards(work, chosen, joined, output)
        _record_layout(output, config, plan)

    choice = Choice(None, {}) if work.config.adapters else choose_base(work, inputs[0], model_type, fold)
    fold(work.output, choice.four_bit)
    return _facts(plan, adapters, headers) | {"base_proved": proved} | choice.facts


def _adapters(work: Work[MergeConfig]) -> list[Input]:
    several = [work.inputs[adapter_role(index)] for index in range(len(work.config.adapters))]
    return several or [work.inputs["adapter"]]


def _origin(base: Input) -> Facts:
    """Return where the base came from, which the GGUF will say of itself."""
    known = {name: base.facts.get(name) for name in ("name", "license", "commit")}
    return {"reference": base.reference} | {name: fact for name, fact in known.items() if fact is not None}


def _check_base(base: Input, adapter: Input) -> bool:
    """Refuse an adapter trained on other weights; return whether its training recorded which."""
    trained_on = adapter.facts.get("base_content")
    if trained_on is not None and trained_on != base.content:
        name = adapter.facts.get("base") or f"a base with content {str(trained_on)[:12]}"
        raise BadDataError(
            f"{adapter.reference} was trained on {name}, not on {base.reference} "
            f"(content {base.content[:12]}): merge it into the base it was trained on"
        )
    return trained_on is not None


def _model_config(base: Input) -> dict[str, Any]:
    path = base.path / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadDataError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise BadDataError(f"{path} holds no JSON object")
    if config.get("quantization_config"):
        raise BadDataError(f"{base.reference} holds quantized weights: merge into the unquantized base")
    return config


def _pass_through(work: Work[MergeConfig], trained: Path) -> Facts:
    """Copy a model whose every weight was trained: there is nothing to merge."""
    headers = read_headers(trained)
    if not (trained / "config.json").exists():
        raise BadDataError(f"{trained} has neither {CONFIG} nor config.json: it is no adapter and no model")
    files = [path for path in _files(trained) if path.name not in TRAINING_ONLY]
    size = sum(path.stat().st_size for path in files)
    need_space(work.output, size)
    with work.progress.task("merge (copy)", size, "B") as task:
        for path in files:
            _copy_file(path, work.output / path.name)
            task.advance(path.stat().st_size)
    tensors = sum(len(header.tensors) for header in headers)
    return {"method": "full", "tensors": tensors, "tensors_changed": tensors, "bytes": size}


def _copy_small_files(base: Path, adapter: Path, output: Path) -> None:
    chosen = {path.name: path for path in _files(base) if path.suffix != ".safetensors"}
    chosen |= {name: adapter / name for name in OF_TOKENIZER if (adapter / name).is_file()}
    for name, path in chosen.items():
        _copy_file(path, output / name)


def _files(directory: Path) -> Iterable[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file())


def _copy_file(source: Path, target: Path) -> None:
    with disk_errors(target), source.open("rb") as reader, target.open("xb") as writer:
        copy_range(reader.fileno(), writer.fileno(), 0, 0, source.stat().st_size)


def _write_shards(work: Work[MergeConfig], plan: Plan, joined: Joined, output: Path) -> None:
    threads = work.config.n_threads or min(MOST_THREADS, os.cpu_count() or 1)
    total = sum(shard.size for shard in plan.shards)
    with (
        work.progress.task("merge", total, "B") as task,
        threadpool_limits(1, "blas"),  # ours are the threads; BLAS's would wait for theirs in busy loops
        ThreadPoolExecutor(threads) as pool,
    ):
        for shard in plan.shards:
            target = output / shard.source.name
            write_shard(shard, joined.paths, target, pool, task.advance, joined.combination)


def _record_layout(output: Path, config: dict[str, Any], plan: Plan) -> None:
    """Tell loaders of tokens that training added, and of output embeddings with a tensor of their own."""
    news: dict[str, Any] = {"vocab_size": plan.vocabulary} if plan.vocabulary else {}
    if plan.untied:
        news["tie_word_embeddings"] = False
    if not news:
        return
    text = config.get("text_config")
    if isinstance(text, dict):
        config = config | {"text_config": text | news}
        news = {key: value for key, value in news.items() if key in config or key == "tie_word_embeddings"}
    write_json(output / "config.json", config | news)
    if (output / INDEX).exists():
        index = json.loads((output / INDEX).read_text("utf-8"))
        if plan.untied:
            index["weight_map"][HEAD] = plan.untied
        known = index.get("metadata") or {}
        totals = {"total_size": plan.tensor_bytes, "total_parameters": plan.parameters}
        index["metadata"] = known | {
            key: totals[key] for key in totals if key in known or key == "total_size"
        }
        write_json(output / INDEX, index)


def _facts(plan: Plan, adapters: Sequence[Adapter], headers: Sequence[Header]) -> Facts:
    tensors = [tensor for header in headers for tensor in header.tensors.values()]
    return {
        "method": "+".join(sorted({_method(adapter) for adapter in adapters})),
        "rank": adapters[0].settings.r,
        "alpha": adapters[0].settings.lora_alpha,
        "adapters": len(adapters),
        "tensors": sum(len(shard.places) for shard in plan.shards),
        "tensors_changed": plan.changed,
        "types": sorted({tensor.dtype for tensor in tensors}),
        "bytes": sum(shard.size for shard in plan.shards),
        "untied": plan.untied is not None,
        "vocabulary": plan.vocabulary,
    }


def _method(adapter: Adapter) -> str:
    named = {"rslora": adapter.settings.use_rslora, "dora": adapter.settings.use_dora}
    return "+".join(name for name, used in named.items() if used) or "lora"

"""A model of transformers answers the probe set: the trained one in memory, or a directory on the CPU.

Weights keep their 16-bit type where they lie, and each is raised to float32 only while it is multiplied.
So the answers are those of float32 arithmetic, the same within its rounding on a GPU and on a CPU, and a
small divergence means a small difference of weights instead of noise. For a directory the weights stay
in the memory-mapped files, which the system drops under pressure: what is needed besides is a matrix of
``CHUNK`` numbers (or a layer's experts together, where they are one tensor), the activations of one
prompt, and its keys and values for ``CACHED_TOKENS`` tokens, about 0.3 GB for a model of 8B parameters and
twice that while they are copied.
A model larger than memory is read from disk once or twice for each probe; fewer probes make that shorter.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunemill.errors import BadDataError, ConfigurationError
from tunemill.parity.distributions import Distributions
from tunemill.parity.measure import Logits
from tunemill.parity.measure import measure as put
from tunemill.parity.probes import Probes, Tokenize
from tunemill.tokenizer import load_tokenizer

CHUNK = 4 << 20  # numbers of a matrix raised at once: 16 MB, which a processor's cache may hold
CACHED_TOKENS = 1024
HALF = (torch.bfloat16, torch.float16)
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError)
"""What transformers raises for damaged or unknown model files."""


def measure(directory: Path, probes: Probes, tick: Callable[[], None] = lambda: None) -> Distributions:
    """Return the distributions of a model directory, computed on the CPU.

    Raises:
        BadDataError: the model cannot be loaded, or computes no numbers.
    """
    return measure_model(_load(directory), probes, tick)


def measure_model(model: Any, probes: Probes, tick: Callable[[], None] = lambda: None) -> Distributions:
    """Return the distributions of a model in memory, with or without a PEFT adapter, on its device."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), in_float32(model):
            return put(TorchEngine(model), probes, tick)
    finally:
        model.train(training)


def tokenizer_of(directory: Path) -> Tokenize:
    """Return how a model directory's tokenizer reads texts as they are.

    Raises:
        BadDataError: transformers cannot read it.
    """
    return reader(load_tokenizer(directory))


def reader(tokenizer: Any) -> Tokenize:
    """Return how a loaded tokenizer of transformers reads texts as they are."""

    def tokenize(texts: Sequence[str]) -> list[list[int]]:
        return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    return tokenize


def _load(directory: Path) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would mix with ours
    try:
        return AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype="auto"
        )
    except ImportError as error:
        raise ConfigurationError(f"the model cannot be loaded here: {_first_line(error)}") from error
    except (*LOADING_ERRORS, SafetensorError) as error:
        raise BadDataError(f"the model in {directory} cannot be loaded: {_first_line(error)}") from error


class TorchEngine:
    """A causal language model of transformers."""

    def __init__(self, model: Any) -> None:
        self._model = model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._keeps = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._device = next(model.parameters()).device
        self._cache: Any = None
        self._length = 0

    def read(self, tokens: Sequence[int], wanted: Sequence[int]) -> Logits:
        """Read a prompt anew; return ``(wanted, vocabulary)`` logits after those of its tokens."""
        kept = torch.tensor(wanted, device=self._device)
        arguments = {"logits_to_keep": kept} if self._keeps else {}
        answer = self._model(input_ids=self._ids([tokens]), use_cache=True, **arguments)
        self._cache, self._length = answer.past_key_values, len(tokens)
        logits = answer.logits[0] if self._keeps else answer.logits[0, kept]
        return _array(logits)

    def go_on(self, texts: Sequence[Sequence[int]]) -> list[Logits]:
        """Return for each text after the prompt the logits after each of its tokens."""
        rows = max(1, CACHED_TOKENS // self._length)
        found: list[Logits] = []
        for start in range(0, len(texts), rows):
            chosen = texts[start : start + rows]
            longest = max(map(len, chosen))
            # What fills up a shorter text comes after it, where no token of the text looks.
            filled = [[*text, *[text[-1]] * (longest - len(text))] for text in chosen]
            cache = copy.deepcopy(self._cache)
            cache.batch_repeat_interleave(len(chosen))
            answer = self._model(input_ids=self._ids(filled), past_key_values=cache, use_cache=True)
            found += [_array(row[: len(text)]) for row, text in zip(answer.logits, chosen, strict=True)]
        return found

    def _ids(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([list(row) for row in rows], device=self._device)


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Let a model compute in float32, whatever type its weights are kept in.

    Where the attention takes only 16-bit types the model computes as it was loaded.
    """
    if "flash" in str(getattr(model.config, "_attn_implementation", "")):
        yield
        return
    with ExitStack() as undo:
        for module in model.modules():
            _raise(module, undo)
        yield


def _raise(module: Any, undo: ExitStack) -> None:
    if hasattr(module, "compute_dtype"):  # of bitsandbytes, which unpacks NF4 exactly in any type
        undo.callback(setattr, module, "compute_dtype", module.compute_dtype)
        module.compute_dtype = torch.float32
    elif not any(weight.dtype in HALF for weight in module.parameters(recurse=False)):
        return
    elif type(module) is nn.Linear:
        setattr(module, "forward", partial(_linear, module))  # noqa: B010 - mypy would take it for a method
        undo.callback(delattr, module, "forward")
    elif isinstance(module, nn.Embedding):  # a few rows of a large table
        undo.callback(module.register_forward_hook(_raise_output).remove)
    else:
        undo.callback(module.register_forward_pre_hook(_raise_weights).remove)
        undo.callback(module.register_forward_hook(_lower_weights, always_call=True).remove)


def _linear(module: nn.Linear, numbers: torch.Tensor) -> torch.Tensor:
    """Return ``numbers @ weight.T + bias`` in float32, a few rows of the weight at a time."""
    rows = max(1, CHUNK // module.in_features)
    numbers = numbers.float()
    parts = [nn.functional.linear(numbers, part.float()) for part in torch.split(module.weight, rows)]
    result = torch.cat(parts, dim=-1)
    return result if module.bias is None else result + module.bias.float()


def _raise_output(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.float()


def _raise_weights(module: Any, _inputs: Any) -> None:
    module.kept_weights = [(weight, weight.data) for weight in module.parameters(recurse=False)]
    for weight, data in module.kept_weights:
        if data.dtype in HALF:
            weight.data = data.float()


def _lower_weights(module: Any, _inputs: Any, _output: Any) -> None:
    for weight, data in module.kept_weights:
        weight.data = data
    del module.kept_weights


def _array(logits: torch.Tensor) -> Logits:
    array: Logits = logits.float().cpu().numpy()
    return array


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

"""Proves a quantization on another kind of host than the one that made it, by its own probe set.

Its maker's answers to the probes travel with the file. The same file answers them here, through the very
engine that will predict; what differs is this host's arithmetic. Kernels for other instruction sets round
otherwise, which costs far less than the limits below; a build that computes wrongly costs far more.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

import llama_cpp
import numpy as np

from tunemill.errors import ConfigurationError
from tunemill.host import this_host
from tunemill.infer.config import InferConfig
from tunemill.infer.engine import Engine, Logits, Size, join, run_of
from tunemill.infer.model import Model
from tunemill.parity import distributions, probes
from tunemill.parity.compare import compare
from tunemill.parity.config import Limits
from tunemill.parity.distributions import Distributions
from tunemill.parity.gate import headline, judge
from tunemill.parity.measure import AT_ONCE, measure
from tunemill.parity.probes import Probes
from tunemill.work import Facts, Work

UNQUANTIZED = ("F16", "all F32", "BF16")
"""How llama.cpp's description of a model ends that no host has rounded."""
LIMITS = Limits(max_mean_kl=0.01, max_worst_kl=0.5, min_top1=0.97, max_label_flips=0.05, min_p_value=0.01)
"""Two builds, with and without AVX-512, differ by a mean KL of some 1e-5 with the same Q4_K_M file."""


def reprove(work: Work[InferConfig], model: Model) -> Facts:
    """Return on which class of host this runs; if the model was quantized on another, prove it here first.

    Raises:
        ConfigurationError: it was, and cannot be proved or answers otherwise.
    """
    gguf, here = work.inputs["gguf"], this_host().host_class
    if gguf.bound_to is None and _quantized(model):
        work.progress.say(f"{gguf.reference}: on which kind of host it was quantized is not known")
    if gguf.bound_to in (None, here):
        return {"host_class": here}
    for name in (probes.FILE, distributions.FILE):
        if not (gguf.path / name).exists():
            raise ConfigurationError(
                f"{gguf.reference} has no {name} to be proved by: --requantize makes it here from the F16"
            )
    chosen, reference = Probes.load(gguf.path), Distributions.load(gguf.path)
    threads = work.config.n_threads or os.cpu_count() or 1
    with (
        work.progress.task("reprove", len(chosen.probes), "probes") as task,
        Engine(model, _size(work.config, chosen), threads) as engine,
    ):
        found = measure(Asked(engine), chosen, lambda: task.advance(1))
    comparison = compare(chosen, reference, found)
    if complaints := judge(comparison, LIMITS):
        raise ConfigurationError(
            f"{gguf.reference} does not answer as where it was quantized ({gguf.bound_to}): "
            f"{'; '.join(complaints)}; --requantize makes it here ({here})"
        )
    figures = headline(comparison)
    work.progress.say(
        f"quantized on another kind of host ({gguf.bound_to}), proved on this one by {comparison.probes} "
        f"prompts: mean KL {comparison.mean_kl:.2g}, worst {comparison.worst_kl:.2g}"
    )
    return {"host_class": here, "reproved": {"quantized_on": gguf.bound_to, **figures}}


def _quantized(model: Model) -> bool:
    text = ctypes.create_string_buffer(256)
    llama_cpp.llama_model_desc(model.handle, text, len(text))
    return not text.value.decode().endswith(UNQUANTIZED)


class Asked:
    """This stage's engine, as the probes are put to any."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._prompt: tuple[int, ...] = ()

    def read(self, tokens: Sequence[int], wanted: Sequence[int]) -> Logits:
        """Read a prompt anew; return ``(wanted, vocabulary)`` logits after those of its tokens."""
        self._engine.share(())
        batch = run_of(tokens, 0, [0], output_last=False)
        batch.outputs[list(wanted)] = 1
        logits = np.array(self._engine.decode(batch))
        self._prompt = tuple(tokens)
        self._engine.share(self._prompt)
        return logits

    def go_on(self, texts: Sequence[Sequence[int]]) -> list[Logits]:
        """Return for each text after the prompt the logits after each of its tokens."""
        start = len(self._prompt)
        parts = [run_of(text, start, [number], output_last=False) for number, text in enumerate(texts)]
        batch = join(parts)
        batch.outputs[:] = 1
        logits = np.array(self._engine.decode(batch))
        self._engine.forget()
        return np.split(logits, np.cumsum([len(text) for text in texts])[:-1])


def _size(config: InferConfig, chosen: Probes) -> Size:
    """Return a context in which any probe fits with the answers that are computed together."""
    most = max(
        len(probe.prompt.tokens)
        + max(len(probe.answer.tokens), *(AT_ONCE * len(label.tokens) for label in probe.labels), 0)
        for probe in chosen.probes
    )
    return Size(most, config.n_batch, config.flash_attn)

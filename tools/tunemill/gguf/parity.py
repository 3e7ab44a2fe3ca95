"""A GGUF's part in the parity gate: it answers the probes as the model did that it was made from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tunemill.gguf.config import ConvertConfig, QuantizeConfig
from tunemill.gguf.library import Library
from tunemill.parity.config import Limits
from tunemill.parity.distributions import Distributions
from tunemill.parity.gate import Proof, prove
from tunemill.parity.probes import Probes
from tunemill.work import Facts, Work

BY_BITS: Mapping[int, Limits] = {
    8: Limits(0.01, 0.5, 0.97, 0.05, 0.01),
    6: Limits(0.02, 1, 0.95, 0.05, 0.01),
    5: Limits(0.05, 2, 0.9, 0.1, 0.01),
    4: Limits(0.1, 3, 0.85, 0.1, 0.01),
    3: Limits(0.4, 6, 0.7, 0.25, 0.01),
    2: Limits(1.5, 10, 0.4, 0.5, 0.01),
    1: Limits(4, 20, 0.1, 1, 0.01),
}
"""Limits of a quantization by the bits in its type's name. docs/parity.md says where they come from."""


@dataclass(frozen=True)
class Gguf:
    """A GGUF, computed by llama.cpp on the CPU."""

    path: Path
    library: Library

    def tokenize(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """Return token ids of texts as they are."""
        ids: list[list[int]] = self.library.tokenize(self.path, texts).value["ids"]
        return ids

    def measure(self, probes: Probes, tick: Callable[[], None]) -> Distributions:
        """Answer the probes."""
        return self.library.measure(self.path, probes, tick)


def prove_conversion(work: Work[ConvertConfig], gguf: Path) -> Facts:
    """Compare a converted model with the merged one.

    Raises:
        BadDataError: parity is lost and the result is not to be published anyway.
    """
    config = work.config
    proof = Proof(
        step="convert",
        source=work.inputs["merged"].path,
        output=work.output,
        limits=config.limits("convert"),
        wanted=config.parity_probes > 0,
        publish_anyway=config.publish_anyway,
    )
    return prove(proof, Gguf(gguf, Library(work.scratch, work.stop)), work.progress)


def prove_quantization(work: Work[QuantizeConfig], gguf: Path) -> Facts:
    """Compare a quantized model with the unquantized one.

    Raises:
        BadDataError: parity is lost and the result is not to be published anyway.
    """
    config = work.config
    proof = Proof(
        step="quantize",
        source=work.inputs["gguf"].path,
        output=work.output,
        limits=quantization_limits(config),
        wanted=config.parity_probes > 0,
        publish_anyway=config.publish_anyway,
    )
    return prove(proof, Gguf(gguf, Library(work.scratch, work.stop)), work.progress)


def quantization_limits(config: QuantizeConfig) -> Limits:
    """Return the limits of a type, with those that were set."""
    digit = re.search(r"\d", config.quant)
    bits = int(digit[0]) if digit else max(BY_BITS)
    usual = BY_BITS[min(known for known in BY_BITS if known >= min(bits, max(BY_BITS)))]
    own = {name: getattr(config, f"quantize_{name}") for name in Limits.__dataclass_fields__}
    return replace(usual, **{name: value for name, value in own.items() if value is not None})

"""A GGUF's part in the parity gate: it answers the probes as the model did that it was made from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunemill.gguf.config import ConvertConfig, QuantizeConfig
from tunemill.gguf.library import Library
from tunemill.parity.config import Limits, chosen_limits
from tunemill.parity.distributions import Distributions
from tunemill.parity.gate import Proof, prove
from tunemill.parity.probes import Probes
from tunemill.work import Facts, Work

BY_BITS: Mapping[int, Limits] = {
    8: Limits(0.005, 0.5, 0.97, 0.05, 0.01),
    6: Limits(0.015, 1, 0.93, 0.1, 0.01),
    5: Limits(0.04, 2, 0.85, 0.1, 0.01),
    4: Limits(0.1, 4, 0.75, 0.15, 0.01),
    3: Limits(0.4, 8, 0.65, 0.25, 0.01),
    2: Limits(1, 12, 0.4, 0.4, 0.01),
    1: Limits(4, 20, 0.1, 1, 0.01),
}
"""Limits of a quantization by the bits in its type's name. docs/parity.md says where they come from."""
EXACT = Limits(0.001, 0.1, 0.98, 0.05, 0.01)
"""Of a conversion to a type that keeps at least 11 bits of each number and of what it is multiplied with."""
BY_OUTTYPE: Mapping[str, Limits] = {"f32": EXACT, "f16": EXACT, "bf16": BY_BITS[8], "q8_0": BY_BITS[8]}
"""Limits of a conversion; llama.cpp rounds what a BF16 matrix is multiplied with to BF16 too."""


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
        limits=chosen_limits(config, "convert", BY_OUTTYPE[config.outtype]),
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
        limits=chosen_limits(config, "quantize", quantization_limits(config.quant)),
        wanted=config.parity_probes > 0,
        publish_anyway=config.publish_anyway,
    )
    return prove(proof, Gguf(gguf, Library(work.scratch, work.stop)), work.progress)


def quantization_limits(quant: str) -> Limits:
    """Return the usual limits of a quantization type."""
    digit = re.search(r"\d", quant)
    bits = int(digit[0]) if digit else max(BY_BITS)
    return BY_BITS[min(known for known in BY_BITS if known >= min(bits, max(BY_BITS)))]

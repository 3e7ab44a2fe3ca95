"""The merge's part in the parity gate: the merged model answers the probes as the trained one did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tunemill.errors import ConfigurationError
from tunemill.merge.config import MergeConfig
from tunemill.parity.config import Limits, chosen_limits
from tunemill.parity.distributions import Distributions
from tunemill.parity.gate import Proof, prove
from tunemill.parity.probes import Probes
from tunemill.work import Facts, Work

NEEDED = ("torch", "transformers")
USUAL = Limits(max_mean_kl=0.003, max_worst_kl=0.3, min_top1=0.97, max_label_flips=0.05, min_p_value=0.01)
"""docs/parity.md says where they come from."""


def check(config: MergeConfig) -> None:
    """See that what computes the merged model's answers is installed, before any input is pulled.

    Raises:
        ConfigurationError: it is not.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if config.parity_probes and missing:
        raise ConfigurationError(
            f"merge compares its model with the trained one, for which {' and '.join(missing)} is missing: "
            "pip install 'tunemill[merge]', or set parity_probes=0 to merge without a proof"
        )


def prove_parity(work: Work[MergeConfig]) -> Facts:
    """Compare the merged model with the answers that training left in the adapter's artifact.

    Raises:
        BadDataError: parity is lost and the result is not to be published anyway.
    """
    config = work.config
    proof = Proof(
        step="merge",
        source=work.inputs["adapter"].path,
        output=work.output,
        limits=chosen_limits(config, "merge", USUAL),
        wanted=config.parity_probes > 0,
        publish_anyway=config.publish_anyway,
    )
    return prove(proof, Merged(work.output), work.progress)


@dataclass(frozen=True)
class Merged:
    """A merged model, computed by transformers on the CPU."""

    directory: Path

    def tokenize(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """Return token ids of texts as they are."""
        from tunemill.parity import hf

        return hf.tokenizer_of(self.directory)(texts)

    def measure(self, probes: Probes, tick: Callable[[], None]) -> Distributions:
        """Answer the probes."""
        from tunemill.parity import hf

        return hf.measure(self.directory, probes, tick)

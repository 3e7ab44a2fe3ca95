"""Into which base an adapter trained on 4 bits is merged: the one that answers the probes better.

The 16-bit base is what was published; the 4-bit one, unpacked, is what the adapter was trained on. Neither
is always better, so both are merged and compared with the answers that training left.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunemill.errors import BadDataError
from tunemill.merge.config import MergeConfig
from tunemill.merge.four_bit import DENSE, FourBit, recorded
from tunemill.merge.parity import Merged
from tunemill.parity import probes
from tunemill.parity.compare import Comparison, compare
from tunemill.parity.distributions import Distributions
from tunemill.parity.gate import headline
from tunemill.parity.probes import Probes
from tunemill.work import Facts, Input, Work

SIXTEEN, FOUR = "16bit", "nf4"


@dataclass(frozen=True)
class Choice:
    """What was settled."""

    four_bit: FourBit | None
    """None: the 16-bit base."""
    facts: Facts


def choose_base(
    work: Work[MergeConfig], adapter: Input, model_type: str, fold: Callable[[Path, FourBit | None], None]
) -> Choice:
    """Settle the base; ``fold`` merges into a directory, into the base as held in 4 bits or as it is.

    Raises:
        BadDataError: the 4-bit base is asked for, and the adapter was not trained on one.
    """
    four_bit, wanted = recorded(adapter.facts), work.config.qlora_base
    if four_bit is None:
        if wanted == FOUR:
            raise BadDataError(f"{adapter.reference} was not trained on 4 bits: leave qlora_base at auto")
        return Choice(None, {})
    if wanted != "auto":
        return Choice(four_bit if wanted == FOUR else None, {"base_used": wanted})
    if reason := _not_comparable(work, adapter, model_type):
        work.progress.say(f"merge: taking the 16-bit base, {reason}")
        return Choice(None, {"base_used": SIXTEEN, "base_reason": reason})
    found = {name: _try(work, adapter, fold, name, four_bit) for name in (SIXTEEN, FOUR)}
    best = min(found, key=lambda name: found[name].mean_kl)  # the 16-bit one where they are equal
    shown = ", ".join(f"{name} {comparison.mean_kl:.3g}" for name, comparison in found.items())
    work.progress.say(f"merge: taking the {best} base; mean KL to the trained model: {shown}")
    figures = {name: headline(comparison) for name, comparison in found.items()}
    return Choice(four_bit if best == FOUR else None, {"base_used": best, "base_candidates": figures})


def _not_comparable(work: Work[MergeConfig], adapter: Input, model_type: str) -> str | None:
    if not work.config.parity_probes or not (adapter.path / probes.FILE).exists():
        return "there are no probes to compare it with the one that training saw"
    if model_type not in DENSE:
        return f"which tensors of type {model_type!r} training held in 4 bits is not known"
    return None


def _try(
    work: Work[MergeConfig],
    adapter: Input,
    fold: Callable[[Path, FourBit | None], None],
    name: str,
    four_bit: FourBit,
) -> Comparison:
    """Merge one candidate beside the output, compare it, and remove it: two would double the space."""
    folder = work.scratch / f"base-{name}"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir(parents=True)
    try:
        fold(folder, four_bit if name == FOUR else None)
        chosen, reference = Probes.load(adapter.path), Distributions.load(adapter.path)
        with work.progress.task(f"merge ({name} base)", len(chosen.probes), "probes") as task:
            return compare(chosen, reference, Merged(folder).measure(chosen, task.advance))
    finally:
        shutil.rmtree(folder, ignore_errors=True)

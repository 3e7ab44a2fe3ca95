"""Several adapters of one base read as one change of each tensor.

As in PEFT, only low-rank pairs can be combined: what an adapter replaces, its biases, tokens, magnitudes
or experts have no weighted sum that anybody defined. An adapter that has such is refused by name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tunemill.errors import BadDataError
from tunemill.merge.adapter import Adapter
from tunemill.merge.change import Change
from tunemill.merge.combine import SAME_RANK, Combination
from tunemill.merge.config import MergeConfig
from tunemill.merge.same import same_bytes
from tunemill.weights import Header


@dataclass(frozen=True)
class Joined:
    """What is done to the base, by one adapter or by several."""

    changes: Mapping[str, Change]
    """By the name that the tensor has in the model."""
    paths: Sequence[Path]
    """The adapters' weight files."""
    keep_tied: bool
    combination: Combination | None = None

    @property
    def name(self) -> str:
        """The files, as messages name them."""
        return " and ".join(map(str, self.paths))


def one(adapter: Adapter) -> Joined:
    """Return a single adapter as it is."""
    return Joined(adapter.changes, [adapter.header.path], adapter.settings.ensure_weight_tying)


def join(adapters: Sequence[Adapter], config: MergeConfig, base: Sequence[Header]) -> Joined:
    """Return several adapters as PEFT's ``add_weighted_adapter`` would make them one.

    Raises:
        BadDataError: one has more than low-rank pairs, or the ranks differ where they must not.
    """
    ranks = [max(adapter.settings.r, *adapter.settings.rank_pattern.values(), 1) for adapter in adapters]
    kind = "linear" if len(adapters) == 1 else config.combination_type
    if kind in SAME_RANK and len(set(ranks)) > 1:
        raise BadDataError(
            f"combination_type={kind} needs adapters of one rank, these have {', '.join(map(str, ranks))}: "
            "set combination_type to cat or svd"
        )
    if adapters[0].settings.use_rslora:
        raise BadDataError(
            f"{adapters[0].header.path} uses rsLoRA, which PEFT would scale twice: name another adapter first"
        )
    found: dict[str, list[tuple[Change, float]]] = defaultdict(list)
    for adapter, weight in zip(adapters, config.adapter_weights, strict=True):
        for name, change in _products(adapter, base).items():
            found[name].append((change, weight))
    changes = {
        name: Change(pairs=tuple(change.pairs[0] for change, _ in parts), weights=tuple(w for _, w in parts))
        for name, parts in found.items()
    }
    if kind in SAME_RANK:
        _check_shapes(changes, kind)
    combination = Combination(
        kind,
        config.density if config.density is not None else 1.0,
        config.majority_sign_method,
        config.svd_rank or max(ranks),
        config.dare_seed,
    )
    tied = any(adapter.settings.ensure_weight_tying for adapter in adapters)
    return Joined(changes, [adapter.header.path for adapter in adapters], tied, combination)


def _products(adapter: Adapter, base: Sequence[Header]) -> dict[str, Change]:
    """Return an adapter's pairs; embeddings that PEFT saved beside theirs are those of the base."""
    found = {}
    for name, change in adapter.changes.items():
        plain = replace(change, whole=None) if _is_bases(name, change, base) else change
        if plain != Change(pairs=plain.pairs) or len(plain.pairs) != 1:
            raise BadDataError(
                f"{adapter.header.path} does more to {name} than add a low-rank product; several adapters "
                "can be merged where each does only that"
            )
        if adapter.settings.target_parameters:
            raise BadDataError(
                f"{adapter.header.path} trains parameters (target_parameters), which PEFT does not combine"
            )
        found[name] = plain
    return found


def _is_bases(name: str, change: Change, base: Sequence[Header]) -> bool:
    if change.whole is None:
        return False
    holders = [header for header in base if name in header.tensors]
    return bool(holders) and same_bytes(
        change.whole.path, change.whole.tensor, holders[0].path, holders[0].tensors[name]
    )


def _check_shapes(changes: Mapping[str, Change], kind: str) -> None:
    for name, change in changes.items():
        if len({(pair.a.shape, pair.b.shape, pair.transposed) for pair in change.pairs}) > 1:
            raise BadDataError(
                f"combination_type={kind} needs pairs of one shape, but the adapters' for {name} differ: "
                "set combination_type to cat or svd"
            )

"""Cuts examples into train, validation and test: groups stay whole, labels keep their share.

The cut depends on the seed, the groups and their order alone, so that the same data and seed
give the same split on every machine. A split that the source gives is kept as it is.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence

from tunemill.data.examples import Example


def split_examples(
    examples: Sequence[Example],
    groups: Sequence[int],
    test_size: float,
    validation_size: float,
    seed: int,
) -> list[str]:
    """Return for every example ``train``, ``validation`` or ``test``.

    A group goes as a whole where its first example's label puts it; of every label with enough
    groups, at least one is held out. A label's share is kept within the size of one group. Of several
    labels the rarest in the data counts, as in iterative stratification (Sechidis et al., 2011): the
    others have texts enough to come out even.
    Where the source gives a test or validation set, only what it leaves is cut.
    """
    splits = [example.split or "train" for example in examples]
    given = set(splits)
    shares: dict[str, float] = {}
    if "test" not in given:
        shares["test"] = test_size
    if "validation" not in given:
        shares["validation"] = validation_size
    strata = _strata(examples, groups, splits)
    held: dict[int, str] = {}
    for label in sorted(strata, key=str):
        held |= _hold_out(strata[label], shares, random.Random(f"{seed} {label}"))
    return [
        held.get(group, split) if split == "train" else split
        for group, split in zip(groups, splits, strict=True)
    ]


def _strata(
    examples: Sequence[Example], groups: Sequence[int], splits: Sequence[str]
) -> dict[Hashable, dict[int, int]]:
    """Return the groups to cut, by label, with how many examples each has."""
    sizes: Counter[int] = Counter()
    first: dict[int, int] = {}
    for position, (group, split) in enumerate(zip(groups, splits, strict=True)):
        if split == "train":
            sizes[group] += 1
            first.setdefault(group, position)
    strata: dict[Hashable, dict[int, int]] = defaultdict(dict)
    often = Counter(name for example in examples for name in example.labels or ())
    for group, position in first.items():
        example = examples[position]
        names = example.labels
        stratum = min(names, key=lambda name: (often[name], name)) if names else example.label
        strata[stratum][group] = sizes[group]
    return strata


def _hold_out(
    sizes: Mapping[int, int], shares: Mapping[str, float], random_source: random.Random
) -> dict[int, str]:
    """Hold out groups of one label, in random order, until each share is reached."""
    total = sum(sizes.values())
    left = list(sizes)
    random_source.shuffle(left)
    chosen: dict[int, str] = {}
    for split, share in shares.items():
        wanted = max(1, round(total * share)) if share > 0 else 0
        for group in list(left):
            if sizes[group] <= wanted and len(left) > 1:  # something must be left to learn from
                wanted -= sizes[group]
                left.remove(group)
                chosen[group] = split
    return chosen

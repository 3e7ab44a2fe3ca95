"""The demo's data through the whole stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as parquet

from tunemill.work import Facts


def test_docstrings_become_a_stratified_split(prepared: Callable[..., tuple[Path, Facts]]) -> None:
    output, facts = prepared(dataset_name="stdlib", prompt="Which chapter? {text}", max_length=2048)
    train, test = (parquet.read_table(output / f"{split}.parquet").to_pylist() for split in ("train", "test"))
    print(facts)
    assert len(train) > 3000
    assert not {row["group"] for row in train} & {row["group"] for row in test}
    assert {row["label"] for row in train} == {row["label"] for row in test}
    assert 0.18 < len(test) / (len(train) + len(test)) < 0.21

"""A dataset on a Hub on a real socket, through the whole prepare stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest

from tunemill.data.config import PrepareConfig
from tunemill.data.prepare import reads
from tunemill.errors import BadDataError, DeniedError, IntegrityError, TransientError, UsageError
from tunemill.work import Facts

Prepared = Callable[..., tuple[Path, Facts]]
CARD = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: small/train.parquet
  - split: held
    path: small/held.parquet
- config_name: other
  data_files: other.csv
dataset_info:
- config_name: small
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': tool
          '1': fruit
---
"""


@pytest.fixture
def repository(tmp_path: Path, hub: Any) -> Path:
    directory = tmp_path / "repository"
    (directory / "small").mkdir(parents=True)
    (directory / "README.md").write_text(CARD)
    (directory / "other.csv").write_text("text,label\nx,1\ny,2\n")
    for name, start, end in (("train", 0, 40), ("held", 40, 50)):
        columns = {
            "text": [f"the text of number {n} is {n * n}" for n in range(start, end)],
            "label": pyarrow.array([n % 2 for n in range(start, end)], pyarrow.int64()),
        }
        parquet.write_table(pyarrow.table(columns), directory / "small" / f"{name}.parquet")
    hub.repositories["someone/data"] = directory
    return directory


def config(**changes: Any) -> dict[str, Any]:
    return {
        "dataset_name": "someone/data", "dataset_revision": "main", "dataset_config": "small",
        "dataset_test_split": "held", **changes,
    }  # fmt: skip


def test_splits_and_label_names_are_the_datasets_own(prepared: Prepared, repository: Path, hub: Any) -> None:
    output, facts = prepared(**config())
    assert facts["rows"] == {"train": 40, "test": 10}
    labels = [row["label"] for row in parquet.read_table(output / "test.parquet").to_pylist()]
    assert labels == ["tool", "fruit"] * 5
    assert reads(PrepareConfig(**config())) == {"commit": hub.commit}


@pytest.mark.parametrize(
    ("changes", "expected", "words"),
    [
        pytest.param({"dataset_test_split": "test"}, BadDataError, "no split 'test', only", id="split"),
        pytest.param({"dataset_config": "huge"}, BadDataError, "someone/data cannot be loaded", id="config"),
        pytest.param({"dataset_revision": "v2"}, UsageError, "no revision v2", id="revision"),
        pytest.param({"dataset_name": "someone/nothing"}, UsageError, "no repository", id="repository"),
    ],
)
def test_what_is_not_there(
    prepared: Prepared, repository: Path, changes: dict[str, Any], expected: type[Exception], words: str
) -> None:
    with pytest.raises(expected, match=words) as error:
        prepared(**config(**changes))
    assert "\n" not in str(error.value)


def test_gated(prepared: Prepared, repository: Path, hub: Any) -> None:
    hub.gated["someone/data"] = "hf_other"
    with pytest.raises(DeniedError, match="gated"):
        prepared(**config())


def test_code_of_its_own_is_never_run(prepared: Prepared, repository: Path) -> None:
    (repository / "data.py").write_text("raise SystemExit('was run')")
    with pytest.raises(BadDataError, match=r"its own code \(data.py\)"):
        prepared(**config())


def test_a_damaged_file_is_not_read(prepared: Prepared, repository: Path, hub: Any) -> None:
    hub.damaged.add("train.parquet")
    with pytest.raises(IntegrityError, match=r"small/train\.parquet arrived damaged"):
        prepared(**config())


def test_nobody_listens(prepared: Prepared, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TransientError, match="network"):
        prepared(**config())

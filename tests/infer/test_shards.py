"""Inference in shards: joined, they are the files of one run; what does not belong together is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from backends import provenance
from tunemill.errors import BadDataError, UsageError
from tunemill.evaluate.config import STAGE as EVALUATE
from tunemill.infer.config import STAGE as INFER
from tunemill.infer.config import InferConfig
from tunemill.infer.predict import predict
from tunemill.infer.rows import Rows
from tunemill.progress import Progress
from tunemill.recipe import Recipe, Setting
from tunemill.signals import Signals
from tunemill.stage import Outcome, execute, plan
from tunemill.store import Draft, Store, open_store
from tunemill.work import Input

Make = Callable[..., Any]
SETTINGS = {"block_rows": 4, "n_threads": 1, "quant": "F16"}


@dataclass
class Lab:
    """A store with a model and data, and the stages over them."""

    root: Path
    store: Store
    gguf: Path
    chosen: dict[str, str] = field(default_factory=dict)

    def publish(self, name: str, kind: str, directory: Path) -> None:
        self.store.publish(Draft(name, kind, directory, {}, provenance(inputs={})), Progress(quiet=True))

    def run(self, stage: Any = INFER, **settings: Any) -> Outcome:
        values = {**SETTINGS, **settings} if stage is INFER else settings
        names = {"model": "micro", "task": "parts", "run": "micro-parts"}
        recipe = Recipe(names, {key: Setting(value, "flag") for key, value in values.items()})
        return execute(self.store, plan(self.store, stage, recipe, {}), Progress(quiet=True), Signals())

    def files(self, outcome: Outcome) -> dict[str, bytes]:
        directory = self.root / outcome.artifact.digest.replace(":", "-")
        self.store.pull(outcome.artifact, directory, Progress(quiet=True))
        return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def lab(micro: Any, dataset: Make, labelled: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("TUNEMILL_CACHE", str(tmp_path / "cache"))
    made = Lab(tmp_path, open_store(str(tmp_path / "store"), create=True), micro.gguf.parent)
    made.publish("micro-parts/gguf-f16", "gguf", micro.gguf.parent)
    given = labelled(30)
    given[9] = (" ", given[9][1])  # one that cannot be asked
    made.publish("micro-parts/data", "data", dataset(given))
    return made


@pytest.mark.parametrize("count", [2, 3, 11], ids=["two", "three", "more than blocks"])
def test_joined_shards_are_the_files_of_one_run(lab: Lab, count: int) -> None:
    whole = lab.run()
    shards = [lab.run(shard_count=count, shard_index=index) for index in range(count)]
    names = [f"micro-parts/predictions-f16-{index}-of-{count}" for index in range(count)]
    assert [shard.artifact.name for shard in shards] == names
    assert sum(shard.artifact.facts["rows"] for shard in shards) == 30
    joined = lab.run(shard_count=count)
    assert joined.artifact.name == whole.artifact.name == "micro-parts/predictions-f16"
    assert lab.files(joined) == lab.files(whole)
    assert joined.artifact.content == whole.artifact.content
    assert joined.artifact.facts["error_reasons"] == {"empty text": 1}
    assert lab.run(shard_count=count).reused


def test_free_answers_are_those_of_one_run(lab: Lab, dataset: Make, labelled: Make) -> None:
    """The seed of an answer hangs on its row's number in the data, not in the shard."""
    lab.publish("micro-parts/data", "data", dataset(labelled(18), (), "text"))
    settings = {"temperature": 1.0, "max_new_tokens": 6}
    whole = lab.run(**settings)
    for index in range(2):
        lab.run(shard_count=2, shard_index=index, **settings)
    assert lab.run(shard_count=2, **settings).artifact.content == whole.artifact.content


def test_evaluate_takes_the_joined(lab: Lab) -> None:
    for index in range(2):
        lab.run(shard_count=2, shard_index=index)
    lab.run(shard_count=2)
    report = lab.run(EVALUATE, quant="F16", bootstrap_rounds=100).artifact
    assert (report.facts["rows"], report.facts["errors"]) == (30, 1)


def test_missing_shards_are_named_all_at_once(lab: Lab) -> None:
    lab.run(shard_count=4, shard_index=1)
    with pytest.raises(UsageError) as caught:
        lab.run(shard_count=4)
    message = str(caught.value)
    assert "\n" not in message
    assert [f"needs shard-{index}:" in message for index in range(4)] == [True, False, True, True]
    assert message.count("micro-parts/predictions-f16-2-of-4") == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        pytest.param(
            {"flash_attn": True},
            r"shard-1 and shard-0 differ in flash_attn \(True and False\)",
            id="settings",
        ),
        pytest.param({"limit": 20}, r"shard-1 and shard-0 differ in limit \(20 and 0\)", id="rows"),
    ],
)
def test_shards_of_different_settings_are_refused(lab: Lab, settings: dict[str, Any], said: str) -> None:
    lab.run(shard_count=2, shard_index=0)
    lab.run(shard_count=2, shard_index=1, **settings)
    with pytest.raises(BadDataError, match=said) as caught:
        lab.run(shard_count=2)
    assert caught.value.exit_code == 65
    assert lab.store.find("micro-parts/predictions-f16") is None


def test_shards_of_different_models_are_refused(lab: Lab, tmp_path: Path) -> None:
    lab.run(shard_count=2, shard_index=0)
    other = tmp_path / "other model"
    shutil.copytree(lab.gguf, other)
    (other / "note.txt").write_text("another artifact")
    lab.publish("micro-parts/gguf-f16", "gguf", other)
    lab.run(shard_count=2, shard_index=1)
    with pytest.raises(BadDataError, match="shard-1 and shard-0 differ in gguf_content"):
        lab.run(shard_count=2)


def swap(shards: list[Path]) -> None:
    record = json.loads((shards[1] / "run.json").read_text())
    (shards[1] / "run.json").write_text(json.dumps({**record, "shard": {"index": 0, "count": 2}}))


def cut(shards: list[Path]) -> None:
    (shards[1] / "predictions.parquet").write_bytes(b"PAR1")


def lose(shards: list[Path]) -> None:
    path = shards[1] / "predictions.parquet"
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.slice(0, 8), path, row_group_size=4)


def strip(shards: list[Path]) -> None:
    record = json.loads((shards[1] / "run.json").read_text())
    del record["config"]
    (shards[1] / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(swap, "is not shard 1 of 2", id="another shard"),
        pytest.param(cut, "shard-1 .* cannot be read", id="no Parquet"),
        pytest.param(lose, r"has \d+ rows in \d blocks, which is not its part of 6", id="blocks lost"),
        pytest.param(strip, "run.json lacks config", id="record without settings"),
    ],
)
def test_damaged_shards_are_named(
    micro: Any, dataset: Make, make_work: Make, labelled: Make, damage: Callable[[Any], None], said: str
) -> None:
    data, outputs = dataset(labelled(30)), []
    for index in range(2):
        work = make_work(
            micro.gguf.parent, data, f"out-{index}", shard_count=2, shard_index=index, block_rows=4
        )
        predict(work)
        outputs.append(work.output)
    damage(outputs)
    work = make_work(micro.gguf.parent, data, "joined", shard_count=2)
    inputs = {f"shard-{n}": Input(f"s@{n}", "c", "predictions", path, {}) for n, path in enumerate(outputs)}
    with pytest.raises(BadDataError, match=said) as caught:
        predict(replace(work, inputs=inputs))
    assert "\n" not in str(caught.value)
    assert not list(work.output.iterdir())


def test_an_index_outside_the_shards_is_refused() -> None:
    with pytest.raises(ValueError, match="shard_index=4 is none of 4 shards"):
        InferConfig(shard_count=4, shard_index=4)


@pytest.mark.parametrize("limit", [0, 1, 7, 29])
def test_the_shards_have_every_row_once(dataset: Make, labelled: Make, limit: int) -> None:
    rows = Rows(dataset(labelled(30)), "test", limit)
    found: dict[int, list[str]] = {}
    for index in range(3):
        part = dict(rows.blocks(4, index, 3))
        assert sum(map(len, part.values())) == rows.count_of(4, index, 3)
        found |= {number: [row.id for row in block] for number, block in part.items()}
    assert [row for number in sorted(found) for row in found[number]] == [
        f"row-{n}" for n in range(limit or 30)
    ]


def test_blocks_are_whole_across_row_groups(dataset: Make, labelled: Make) -> None:
    data = dataset(labelled(30))
    table = pyarrow.parquet.read_table(data / "test.parquet")
    pyarrow.parquet.write_table(table, data / "test.parquet", row_group_size=7)
    assert [len(block) for _, block in Rows(data, "test", 0).blocks(4)] == [4, 4, 4, 4, 4, 4, 4, 2]

"""The demo, whole and unshortened: what its README promises about it holds.

One run of the pipeline serves all tests here; it takes some minutes on two cores.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tunemill.store import Store, open_store

DEMO = ("--model", "tiny", "--task", "stdlib", "--store", "store", "--quant", "F16", "--quant", "Q4_K_M")
RUN = "tiny-stdlib"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Demo:
    store: Store
    folder: Path
    seconds: float
    output: str

    def facts(self, name: str) -> dict[str, Any]:
        return dict(self.store.resolve(f"{RUN}/{name}").facts)


@pytest.fixture(scope="module")
def demo(tunemill: Any, work: Path) -> Demo:
    (work / "store").mkdir()
    started = time.monotonic()
    done = tunemill("pipeline", *DEMO)
    return Demo(open_store(str(work / "store")), work, time.monotonic() - started, done.stdout)


def test_it_learns_what_the_readme_says(demo: Demo) -> None:
    full, quantized = demo.facts("report-f16"), demo.facts("report-q4_k_m")
    assert full["accuracy"] >= 0.6
    assert abs(full["accuracy"] - quantized["accuracy"]) <= 0.02
    assert full["accuracy"] > 2 * full["majority_accuracy"]
    assert full["majority_accuracy"] < full["tfidf_accuracy"] < 1  # both baselines were really run
    assert full["rows"] == quantized["rows"] > 500


def test_both_engines_agreed_on_every_token(demo: Demo) -> None:
    pulled = demo.folder / "gguf"
    demo.store.pull(demo.store.resolve(f"{RUN}/gguf-f16"), pulled, _quiet())
    checked = json.loads((pulled / "tokens.json").read_text())
    assert checked["texts"] > 100  # a single differing one would have stopped the conversion
    assert checked == demo.facts("gguf-f16")["tokens"]


def test_every_artifact_leads_back_to_base_weights_and_data(demo: Demo, tunemill: Any) -> None:
    shown = tunemill("store", "log", f"{RUN}/report-q4_k_m", "--store", "store").stdout
    for stage in ("evaluate", "infer", "quantize", "convert", "merge", "train", "prepare", "fetch"):
        assert stage in shown
    tunemill("store", "verify", f"{RUN}/report-q4_k_m", "--store", "store")


def test_the_report_is_one_page_that_names_the_baselines(demo: Demo) -> None:
    pages = sorted(demo.folder.rglob(".tunemill/reports/**/report.html"))
    assert len(pages) == 2
    page = pages[0].read_text()
    assert 'src="http' not in page
    assert "TF-IDF" in page
    assert str(pages[0].relative_to(demo.folder)) in demo.output


def test_again_everything_is_reused_in_seconds(demo: Demo, tunemill: Any) -> None:
    before = {name: demo.store.resolve(name).digest for name in demo.store.names()}
    started = time.monotonic()
    tunemill("pipeline", *DEMO)
    assert time.monotonic() - started < demo.seconds / 5
    assert {name: demo.store.resolve(name).digest for name in demo.store.names()} == before


def test_predictions_are_one_row_for_each_held_out_text(demo: Demo) -> None:
    import pyarrow.parquet as parquet

    for name in ("data", "predictions-q4_k_m"):
        demo.store.pull(demo.store.resolve(f"{RUN}/{name}"), demo.folder / f"{name}-pulled", _quiet())
    test = parquet.read_table(demo.folder / "data-pulled" / "test.parquet")
    rows = parquet.read_table(demo.folder / "predictions-q4_k_m-pulled" / "predictions.parquet")
    assert rows["id"].to_pylist() == test["id"].to_pylist()
    labels = {
        label["name"] for label in json.loads((demo.folder / "data-pulled" / "labels.json").read_text())
    }
    assert set(rows["label"].to_pylist()) <= labels
    assert all(abs(sum(row) - 1) < 1e-3 for row in rows["probabilities"].to_pylist())


def _quiet() -> Any:
    from tunemill.progress import Progress

    return Progress(quiet=True)

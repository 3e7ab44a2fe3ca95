"""The tree of an artifact, and what differs between two of them."""

from __future__ import annotations

import json

import pytest

from tunemill.errors import UsageError
from tunemill.store import keys
from tunemill.store.diff import Difference, diff
from tunemill.store.diff import lines as diff_lines
from tunemill.store.lineage import ancestors, lineage, lines


@pytest.fixture
def publish(directory_store, make_draft, make_provenance, progress):
    def publish(name, kind, files, inputs, **changes):
        facts = changes.pop("facts", {})
        made = make_provenance(inputs=inputs, **changes)
        draft = make_draft(files, name=name, kind=kind, provenance=made, facts=facts)
        return directory_store.publish(draft, progress)

    return publish


@pytest.fixture
def runs(publish):
    """Two runs that differ in one key of their training, up to their predictions."""
    base = publish("base/tiny", "base", {"model.safetensors": b"base"}, {}, stage="fetch")
    made = []
    for run, rate in (("one", 1e-4), ("two", 2e-4)):
        data = publish("shared/data", "data", {"train.parquet": b"rows"}, {"base": base.reference})
        adapter = publish(
            f"{run}/adapter",
            "adapter",
            {"adapter_model.safetensors": run.encode()},
            {"base": base.reference, "data": data.reference},
            config={"learning_rate": rate, "seed": 42},
        )
        made.append(
            publish(
                f"{run}/predictions",
                "predictions",
                {"predictions.parquet": b"same"},
                {"adapter": adapter.reference},
                stage="infer",
                config={},
                facts={"rows": 3 if run == "one" else None},
            )
        )
    return made


def test_what_was_published_against_its_parity_check_says_so(directory_store, publish):
    facts = {"parity": {"verdict": "overridden", "mean_kl": 0.5}}
    merged = publish("one/merged", "merged", {"a": b"a"}, {}, stage="merge", facts=facts)
    good = {"parity": {"verdict": "passed"}}
    publish("one/gguf-f16", "gguf", {"b": b"b"}, {"merged": merged.reference}, stage="convert", facts=good)
    tree = lineage(directory_store, "one/gguf-f16")
    above, below = lines(tree)
    assert "parity" not in above
    assert below.endswith(", published against its parity check")
    assert [tree.overridden, tree.inputs[0].overridden] == [False, True]
    assert tree.as_json()["inputs"][0]["published_against_parity"] is True


def test_lineage_goes_down_to_base_and_data(directory_store, runs):
    tree = lineage(directory_store, "one/predictions")
    text = list(lines(tree))
    assert text[0].startswith(f"one/predictions@{runs[0].digest[:19]}  infer 0.1.0, 2026-01-02 03:05:05Z")
    assert [line.split("@")[0] for line in text[1:]] == [
        "└─ adapter: one/adapter",
        "   ├─ base: base/tiny",
        "   └─ data: shared/data",
        "      └─ base: base/tiny",
    ]
    assert text[-1].endswith("(above)")
    assert json.loads(json.dumps(tree.as_json()))["inputs"][0]["inputs"][0]["stage"] == "fetch"


def test_input_that_is_not_here_is_said_so(directory_store, publish):
    elsewhere = f"base/elsewhere@sha256:{'9' * 64}"
    publish("run/data", "data", {"train.parquet": b"rows"}, {"base": elsewhere})
    text = list(lines(lineage(directory_store, "run/data")))
    assert text[1] == f"└─ base: base/elsewhere@sha256:{'9' * 12}  not in this store"


def test_ancestors_come_oldest_first_each_once_with_what_was_set(directory_store, runs, publish):
    told = ancestors(directory_store, runs[0])
    names = [one["reference"].partition("@")[0] for one in told]
    assert names == ["base/tiny", "shared/data", "one/adapter", "one/predictions"]
    assert (
        told[-1]["inputs"]["adapter"]
        == told[2]["reference"]
        == directory_store.resolve("one/adapter").reference
    )
    assert told[-1]["published_against_parity"] is False
    assert json.loads(json.dumps(told)) == told
    elsewhere = f"base/elsewhere@sha256:{'9' * 64}"
    lost = publish("run/data", "data", {"train.parquet": b"rows"}, {"base": elsewhere})
    assert ancestors(directory_store, lost)[0] == {"reference": elsewhere, "stage": None}


def test_diff_finds_the_key_far_upstream(directory_store, runs):
    found = diff(directory_store, "one/predictions", "two/predictions")
    assert Difference("adapter", "config", "learning_rate", 1e-4, 2e-4) in found
    assert Difference("", "fact", "rows", 3, None) in found
    assert {each.where for each in found} == {"", "adapter"}
    assert not [each for each in found if each.key in ("seed", "predictions.parquet", "base", "data")]
    assert "  config learning_rate: 0.0001 -> 0.0002" in list(diff_lines(found))


def test_diff_tells_files_apart(directory_store, runs):
    found = diff(directory_store, "one/adapter", "base/tiny")
    files = {each.key: (each.first, each.second) for each in found if each.aspect == "file"}
    assert files["model.safetensors"][0] is None
    assert files["adapter_model.safetensors"][1] is None
    assert Difference("", "kind", "kind", "adapter", "base") in found


def test_an_artifact_does_not_differ_from_itself(directory_store, runs):
    assert diff(directory_store, "one/predictions", runs[0].reference) == []


def test_damaged_upstream_is_reported(directory_store, runs):
    adapter = directory_store.resolve("one/adapter")
    key = keys.manifest(adapter.digest.removeprefix("sha256:"))
    directory_store.backend.delete(key)
    assert "not in this store" in list(lines(lineage(directory_store, "one/predictions")))[1]


@pytest.mark.parametrize("call", [lineage, lambda store, name: diff(store, name, name)])
def test_unknown_reference_is_a_usage_error(directory_store, call):
    with pytest.raises(UsageError, match="no/such"):
        call(directory_store, "no/such")


def test_the_image_of_a_container_is_named(directory_store, publish):
    image = f"tunemill/train@sha256:{'1' * 64}"
    publish("run/adapter", "adapter", {"a": b"1"}, {}, image=image)
    tree = lineage(directory_store, "run/adapter")
    assert tree.as_json()["image"] == image
    assert next(iter(lines(tree))).endswith(f" in tunemill/train@sha256:{'1' * 12}")

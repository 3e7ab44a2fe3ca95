"""Which prompts are chosen, how they are written and read, and what is refused."""

import json
from dataclasses import replace

import pytest

from tunemill.errors import BadDataError
from tunemill.parity.probes import MOST_BYTES, Probes, choose, spread

from .conftest import LABELS, PROMPTING, rows


def test_the_same_rows_in_any_order_give_the_same_set(rendering, probes):
    assert choose(rows(40)[::-1], "validation", LABELS, rendering, 12).digest == probes.digest
    assert choose(rows(20), "validation", LABELS, rendering, 12).digest != probes.digest


def test_a_probe_is_rendered_as_training_renders_a_row(probes):
    probe = probes.probes[0]
    row = next(row for row in rows(40) if probe.origin == f"validation row {row['id']}")
    assert probe.prompt.text == PROMPTING.prompt(row["prompt"])
    assert probe.answer.text == PROMPTING.completion(row["prompt"], row["completion"])
    assert probe.labels[probe.label] == probe.answer
    assert [label.text for label in probe.labels] == ["yes</s>", "no</s>", "maybe a</s>"]
    assert probe.prompt.tokens[0] == 0


def test_read_back_it_is_the_same(probes, tmp_path):
    probes.save(tmp_path)
    loaded = Probes.load(tmp_path)
    assert loaded == probes
    assert loaded.digest == probes.digest


def test_free_answers_have_no_labels(rendering):
    chosen = choose(rows(5), "train", [], rendering, 64)
    assert len(chosen.probes) == 5
    assert chosen.labels == 0
    assert chosen.probes[0].label is None


@pytest.mark.parametrize(
    ("prompt", "answer", "places", "expected"),
    [
        (1, 1, 16, (0,)),
        (3, 2, 16, (0, 1, 2, 3)),
        (100, 2, 4, (0, 49, 99, 100)),
        (100, 50, 4, (0, 49, 99, 100)),
        (100, 50, 1, (99,)),
    ],
)
def test_positions_are_in_the_prompt_and_from_the_beginning_of_the_answer(prompt, answer, places, expected):
    assert spread(prompt, answer, places) == expected


def test_a_large_vocabulary_gets_fewer_positions(rendering):
    large = replace(rendering, vocabulary=256_000)
    chosen = choose(rows(64), "train", [], large, 64)
    assert 2 * 256_000 * sum(len(probe.positions) for probe in chosen.probes) <= MOST_BYTES


def test_a_bos_written_twice_is_refused_before_training(rendering):
    doubled = replace(PROMPTING, chat_template="{{ bos_token }}" + PROMPTING.chat_template)
    with pytest.raises(BadDataError, match=r"begins with <s> twice.*chat_template"):
        choose(rows(3), "train", [], replace(rendering, prompting=doubled), 2)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda v: v.update(version=2), id="version"),
        pytest.param(lambda v: v.update(probes=[]), id="empty"),
        pytest.param(lambda v: v["probes"][0].update(positions=[99]), id="position past the end"),
        pytest.param(lambda v: v["probes"][0].update(positions=[1, 0]), id="descending"),
        pytest.param(lambda v: v["probes"][1].update(labels=[]), id="no labels"),
        pytest.param(lambda v: v["probes"][1].update(label=7), id="no such label"),
        pytest.param(lambda v: v["probes"][0]["prompt"].update(tokens=[]), id="no tokens"),
        pytest.param(lambda v: v["probes"][0].update(prompt="text"), id="no text"),
        pytest.param(lambda v: v.update(probes=3), id="no list"),
    ],
)
def test_a_damaged_set_is_refused(probes, tmp_path, change):
    probes.save(tmp_path)
    value = json.loads((tmp_path / "probes.json").read_text())
    change(value)
    (tmp_path / "probes.json").write_text(json.dumps(value))
    with pytest.raises(BadDataError, match=r"probes\.json is no probe set"):
        Probes.load(tmp_path)

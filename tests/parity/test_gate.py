"""What the gate says, writes and refuses, with a model that is a table."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tunemill.errors import BadDataError
from tunemill.parity.config import Limits
from tunemill.parity.distributions import Distributions
from tunemill.parity.gate import Proof, prove
from tunemill.parity.measure import measure
from tunemill.parity.probes import Probes
from tunemill.progress import Progress

from .conftest import PROMPTING, Table, tokenize

STRICT = Limits(max_mean_kl=1e-3, max_worst_kl=1e-2, min_top1=1, max_label_flips=0, min_p_value=0.01)


class Candidate:
    """A table as the model that a stage made."""

    def __init__(self, table, read=tokenize) -> None:
        self.table, self.tokenize = table, read

    def measure(self, probes, tick):
        return measure(Table(self.table), probes, tick)


class Said(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture
def proof(probes, answers, table, tmp_path) -> Proof:
    """A merge whose input holds the answers of ``table``."""
    source, output = tmp_path / "source", tmp_path / "output"
    for directory in (source, output):
        directory.mkdir()
    probes.save(source)
    answers(table).save(source)
    PROMPTING.save(output)
    return Proof("merge", source, output, STRICT, wanted=True, publish_anyway=False)


def test_an_equal_model_passes_and_leaves_what_the_next_stage_needs(proof, table, probes):
    facts = prove(proof, Candidate(table), Said())["parity"]
    assert facts["verdict"] == "passed"
    assert (facts["probes"], facts["mean_kl"], facts["flips"]) == (12, 0, 0)
    assert Probes.load(proof.output) == probes
    assert Distributions.load(proof.output).probes == probes.digest
    record = json.loads((proof.output / "parity.json").read_text())
    assert record["probe_set"] == probes.digest
    assert record["limits"]["max_mean_kl"] == 1e-3


def test_the_table_shows_every_figure_beside_its_limit(proof, table):
    said = Said()
    prove(proof, Candidate(table), said)
    text = "\n".join(said.lines)
    for title in ("mean KL", "worst KL", "top-1 agreement", "label flips", "lost, gained, p"):
        assert title in text
    assert "<= 0.001" in text


def test_a_model_beyond_a_limit_is_not_published(proof, table):
    other = table + np.random.default_rng(5).normal(0, 1, table.shape).astype(np.float32)
    with pytest.raises(BadDataError) as error:
        prove(proof, Candidate(other), Said())
    line = str(error.value)
    assert line.startswith("merge: parity is lost: mean KL ")
    assert "is over merge_max_mean_kl=0.001" in line
    assert "first at validation row r" in line
    assert "likely another base than the adapter was trained on" in line
    assert "--publish-anyway" in line
    assert "\n" not in line
    assert not (proof.output / "parity.npz").exists()


def test_published_anyway_it_is_on_record(proof, table):
    other, said = np.roll(table, 1, axis=1), Said()
    facts = prove(replace(proof, publish_anyway=True), Candidate(other), said)["parity"]
    assert facts["verdict"] == "overridden"
    assert any("top-1" in complaint for complaint in facts["complaints"])
    assert said.lines[-1].endswith("; published anyway")
    assert json.loads((proof.output / "parity.json").read_text())["verdict"] == "overridden"
    assert (proof.output / "parity.npz").exists()


@pytest.mark.parametrize("step", ["merge", "convert", "quantize"])
def test_every_stage_names_itself_and_what_is_likely(proof, table, step):
    with pytest.raises(BadDataError, match=rf"^{step}: parity is lost: .*; likely .*tensor"):
        prove(replace(proof, step=step), Candidate(-table), Said())


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        pytest.param("{{ bos_token }}{{ bos_token }}", "begins with <s> twice: a doubled BOS", id="doubled"),
        pytest.param("", "no longer begins with <s>: a dropped BOS", id="dropped"),
        pytest.param("{{ bos_token }}c", "another chat template", id="other"),
    ],
)
def test_another_way_of_asking_is_named(proof, table, template, cause):
    asked = PROMPTING.chat_template.replace("{{ bos_token }}", template)
    replace(PROMPTING, chat_template=asked, add_bos=False).save(proof.output)
    with pytest.raises(BadDataError, match=f"validation row r\\d+ .*{cause}.*first at token [01]") as error:
        prove(proof, Candidate(table), Said())
    assert "another base" not in str(error.value)  # the model itself is the same


def test_another_tokenizer_is_named(proof, table):
    def shifted(texts):
        return [[*ids[:1], 3, *ids[1:]] if len(ids) > 3 else ids for ids in tokenize(texts)]

    with pytest.raises(BadDataError, match=r"token 1 is \[3\] and was \[\d\] in training: another tokenizer"):
        prove(proof, Candidate(table, shifted), Said())


def test_an_input_without_probes_is_said_and_recorded(proof, table):
    (proof.source / "probes.json").unlink()
    said = Said()
    facts = prove(proof, Candidate(table), said)
    assert facts["parity"]["verdict"] == "none"
    assert "the input has no probes.json" in facts["parity"]["reason"]
    assert len(said.lines) == 1
    assert "parity is not checked" in said.lines[0]


def test_where_none_is_wanted_the_next_stage_still_has_what_it_needs(proof, table, probes):
    said = Said()
    facts = prove(replace(proof, wanted=False), Candidate(-table), said)
    assert facts == {"parity": {"verdict": "off"}}
    assert "parity_probes=0" in said.lines[0]
    assert Probes.load(proof.output) == probes
    assert (proof.output / "parity.npz").read_bytes() == (proof.source / "parity.npz").read_bytes()


@pytest.mark.parametrize("name", ["parity.npz", "probes.json"])
def test_a_damaged_input_is_no_missing_one(proof, table, name):
    (proof.source / name).write_bytes(b"{")
    with pytest.raises(BadDataError, match=name):
        prove(proof, Candidate(table), Said())


def test_labels_that_got_worse_by_more_than_chance_are_refused(proof, table, probes):
    """Seven right answers lost and none gained: p = 2 / 2**7."""
    from tunemill.parity.compare import Labels, compare, mcnemar
    from tunemill.parity.gate import judge

    same = compare(probes, *2 * (measure(Table(table), probes),))
    loose = Limits(9, 9, 0, 1, 0.05)
    for lost, gained, refused in ((7, 0, True), (4, 0, False), (0, 7, False), (7, 5, False)):
        labels = Labels(lost + gained, lost, gained, mcnemar(lost, gained))
        found = judge(replace(same, labels=labels), loose)
        assert bool(found) == refused
        assert not refused or "7 right answers are lost and 0 gained, p=0.016" in found[0]

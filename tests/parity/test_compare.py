"""The figures, against their definitions computed plainly, and McNemar's test against known values."""

from dataclasses import replace
from math import log

import numpy as np
import pytest

from tunemill.errors import BadDataError
from tunemill.parity.compare import compare, mcnemar
from tunemill.parity.distributions import Distributions
from tunemill.parity.measure import AT_ONCE, log_softmax, measure

from .conftest import Table


def test_a_model_agrees_with_itself(probes, answers, table):
    same = compare(probes, answers(table), answers(table))
    assert (same.mean_kl, same.worst_kl, same.top1, same.first) == (0, 0, 1, None)
    assert (same.labels.flips, same.labels.p_value) == (0, 1)


def test_figures_are_those_of_their_definitions(probes, answers, table):
    other = table + np.random.default_rng(4).normal(0, 0.7, table.shape).astype(np.float32)
    found = compare(probes, answers(table), answers(other))
    divergences, agreed = [], []
    for probe in probes.probes:
        for place in probe.positions:
            token = (*probe.prompt.tokens, *probe.answer.tokens)[place]
            p, q = (log_softmax(t[token][None])[0] for t in (table, other))
            divergences.append(sum(np.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
            agreed.append(p.argmax() == q.argmax())
    assert found.mean_kl == pytest.approx(np.mean(divergences), rel=1e-3)
    assert found.worst_kl == pytest.approx(max(divergences), rel=1e-3)
    assert found.top1 == np.mean(agreed)
    assert found.positions == len(divergences)
    assert found.worst.kl == found.worst_kl


def test_a_label_is_judged_by_all_its_tokens(probes, answers, table):
    likelihoods = answers(table).labels
    for number, probe in enumerate(probes.probes):
        exact = []
        for label in probe.labels:
            before = (probe.prompt.tokens[-1], *label.tokens[:-1])
            steps = log_softmax(table[list(before)])
            exact.append(sum(steps[n, token] for n, token in enumerate(label.tokens)))
        assert likelihoods[number].argmax() == np.argmax(exact)
        assert likelihoods[number].max() == pytest.approx(max(exact))
        assert (likelihoods[number] >= np.array(exact) - 1e-9).all()  # exact, or a bound from above


def test_a_label_that_cannot_be_the_best_is_not_read_to_its_end(rendering, table):
    from tunemill.parity.probes import choose

    names = [f"{'yes' if n else 'no'} {'a ' * n}b" for n in range(40)]  # one begins otherwise
    row = {"id": "r", "prompt": [{"role": "user", "content": "a"}], "completion": names[0]}
    table[2] = -20
    table[2, 6] = 20  # after "a" comes "no"
    engine = Table(table)
    measure(engine, choose([row], "train", names, rendering, 1))
    assert engine.asked <= AT_ONCE + 1  # the likeliest, and the right answer for its distributions


def test_flips_and_the_first_token_that_differs_are_named(probes, answers, table):
    other = table.copy()
    other[2] = np.roll(other[2], 1)  # what comes after "a"
    found = compare(probes, answers(table), answers(other))
    place = found.first
    probe = probes.probes[place.probe]
    tokens = (*probe.prompt.tokens, *probe.answer.tokens)
    assert tokens[place.position - 1] == 2
    assert place.expected == table[2].argmax()
    assert place.found == other[2].argmax()
    assert found.labels.flips == sum(
        a.argmax() != b.argmax() for a, b in zip(answers(table).labels, answers(other).labels, strict=True)
    )


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0), (6, 0, 2 / 64), (0, 8, 2 / 256), (9, 1, 22 / 1024)],
)
def test_mcnemar_is_exact(lost, gained, p):
    assert mcnemar(lost, gained) == p
    assert mcnemar(gained, lost) == p


def test_mcnemar_of_very_many_answers_is_a_number():
    assert mcnemar(3000, 1000) < 1e-200
    assert mcnemar(2000, 2000) == 1


def test_files_read_back_are_the_same_and_have_the_same_bytes(answers, table, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        answers(table).save(tmp_path / name)
    loaded = Distributions.load(tmp_path / "one")
    assert (loaded.rows == answers(table).rows).all()
    assert (tmp_path / "one" / "parity.npz").read_bytes() == (tmp_path / "two" / "parity.npz").read_bytes()


def test_rounding_costs_less_than_the_limits_by_far(probes, answers, table):
    exact = answers(table)
    rounded = replace(exact, rows=exact.rows + np.float16(2**-7) * (exact.rows < -4))
    assert compare(probes, exact, rounded).mean_kl < log(2) * 1e-3


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"rows": np.zeros((4, 8), np.float32)}, id="type"),
        pytest.param({"rows": np.full((4, 8), np.nan, np.float16)}, id="not a number"),
        pytest.param({"labels": np.zeros(4)}, id="shape"),
    ],
)
def test_damaged_distributions_are_refused(answers, table, tmp_path, change):
    replace(answers(table), **change).save(tmp_path)
    with pytest.raises(BadDataError, match=r"parity\.npz holds no distributions"):
        Distributions.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY"])
def test_a_file_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "parity.npz").write_bytes(content)
    with pytest.raises(BadDataError, match=r"parity\.npz holds no distributions"):
        Distributions.load(tmp_path)


def test_mixed_files_and_other_vocabularies_are_refused(probes, answers, table):
    found = answers(table)
    with pytest.raises(BadDataError, match="another probe set"):
        compare(probes, replace(found, probes="0" * 64), found)
    with pytest.raises(BadDataError, match="does not fit"):
        compare(probes, replace(found, rows=found.rows[:3]), found)
    with pytest.raises(BadDataError, match="vocabulary of 7 tokens"):
        compare(probes, found, replace(found, rows=found.rows[:, :7]))


def test_a_model_that_computes_no_numbers_is_named(answers, table):
    table[2, 3] = np.nan
    with pytest.raises(BadDataError, match="computes no numbers for validation row"):
        answers(table)

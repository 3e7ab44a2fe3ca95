"""Which texts are compared, and how a difference is told."""

from itertools import pairwise

import pytest

from tunemill.errors import BadDataError
from tunemill.gguf.tokens import ROWS, Probe, check_one_bos, choose, collect_probes, compare
from tunemill.prompting import read_prompting


def test_odd_texts_are_always_compared():
    rows = [f"plain text number {number}" for number in range(5000)]
    rows[777], rows[1234], rows[4000] = "", "long " * 500, "naïve ☃ 😀 中文"
    chosen = choose(rows, lambda row: row)
    assert len(chosen) == ROWS
    assert {rows[777], rows[1234], rows[4000]} <= set(chosen)
    places = [rows.index(row) for row in chosen]
    assert max(b - a for a, b in pairwise(places)) < 50, "the rest is spread evenly"


def test_few_rows_are_all_compared():
    assert choose(["a", "b"], str) == ["a", "b"]


def test_probes_are_what_train_and_infer_feed(made, data):
    prompting = read_prompting(made)
    probes = collect_probes(data, prompting)
    assert probes[0].origin == "train row 0, prompt"
    assert probes[0].text.startswith("<s><|user|>")
    assert probes[0].text.endswith("<|assistant|>")
    assert probes[1] == Probe("train row 0, completion", "A label</s>")
    assert any(probe.origin.startswith("test row") for probe in probes)


def test_data_without_rows(made, tmp_path):
    with pytest.raises(BadDataError, match="no rows"):
        collect_probes(tmp_path, read_prompting(made))


def test_data_that_are_no_parquet(made, tmp_path):
    (tmp_path / "test.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(BadDataError, match=r"test\.parquet cannot be read"):
        collect_probes(tmp_path, read_prompting(made))


PROBES = [Probe("train row 0, prompt", "<s>one"), Probe("train row 0, completion", "two")]


def test_equal_ids_pass():
    compare(PROBES, [[1, 2], [3]], [[1, 2], [3]])


@pytest.mark.parametrize(
    ("got", "words"),
    [
        pytest.param(
            [[1, 2], [9]],
            ["row 0, completion", "token 0 is 3 in transformers and 9 in llama.cpp"],
            id="other",
        ),
        pytest.param(
            [[1, 1, 2], [3]], ["row 0, prompt", "token 1 is 2 in transformers and 1 in"], id="doubled-bos"
        ),
        pytest.param([[1], [3]], ["token 1 is 2 in transformers and None in"], id="shorter"),
    ],
)
def test_the_first_difference_is_named(got, words):
    with pytest.raises(BadDataError) as caught:
        compare(PROBES, [[1, 2], [3]], got)
    assert all(word in str(caught.value) for word in ["1 of 2 texts", *words]), caught.value


@pytest.mark.parametrize("ids", [[1, 1, 5], [5, 6], []])
def test_bos_is_there_exactly_once(ids):
    check_one_bos(PROBES, [[1, 5], [9]], 1)
    with pytest.raises(BadDataError, match="BOS"):
        check_one_bos(PROBES, [ids, [9]], 1)

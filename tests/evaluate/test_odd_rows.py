"""Few rows, one label, nothing right, nothing answered: every figure is a number or is left out."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from tunemill.evaluate.baselines import Training
from tunemill.evaluate.bootstrap import clusters_of
from tunemill.evaluate.config import EvaluateConfig
from tunemill.evaluate.evaluate import as_record, judge
from tunemill.evaluate.figures import Judged
from tunemill.evaluate.predictions import Predictions, checked
from tunemill.progress import Progress
from tunemill.task import Task

LABELS = ("low", "mid", "high")
FORMS = {
    "label": Task("label", LABELS),
    "levels": Task("label", LABELS, ordered=True),
    "dimensions": Task("label", LABELS, ordered=True, dimensions=("hope", "trust")),
    "labels": Task("labels", LABELS, 3),
    "text": Task("text"),
    "numbers": Task("text", answer_kind="numbers-and-spans"),
}


def rows(form: str, random: np.random.Generator) -> Predictions:
    """Return one to six rows, of which any may lack an answer, from one label to all of them."""
    task, count, variety = FORMS[form], int(random.integers(1, 7)), int(random.integers(1, 4))
    several = task.form == "labels"

    def drawn(missing: float) -> list[tuple[str, ...] | None]:
        found: list[tuple[str, ...] | None] = []
        for _ in range(count):
            size = int(random.integers(1, variety + 1)) if several else 1
            chosen = random.choice(LABELS[:variety], size, replace=False)
            found.append(None if random.random() < missing else tuple(map(str, chosen)))
        return found

    golds, answers = drawn(0), drawn(random.choice([0, 0.3, 1]))
    shares = np.array([random.dirichlet(np.ones(3)) if one else np.zeros(3) for one in answers])
    names = tuple(f"{n}" for n in range(count))
    coders = {"Ann": drawn(0.5), "Bob": drawn(0.5)} if task.form == "label" else {}
    return checked(
        Predictions(
            task,
            names,
            names,
            tuple("; ".join(one or ()) for one in golds),
            tuple(None if one is None else "; ".join(one) for one in answers),
            tuple("too long" if one is None else None for one in answers),
            shares if task.labels else None,
            tuple(one or () for one in golds) if several else (),
            tuple(answers) if several else (),
            tuple(f"text {n // 2}" for n in range(count)) if task.dimensions else (),
            tuple(task.dimensions[n % 2] for n in range(count)) if task.dimensions else (),
            {name: tuple(one and one[0] for one in given) for name, given in coders.items()},
        ),
        form,
    )


def judged(given: Predictions, corpus: Predictions | None) -> Judged:
    clusters = clusters_of(given.items or given.ids)
    training = Training(("a word", "two words"), (("low",), ("mid",)), (None, None))
    config = EvaluateConfig(bootstrap_rounds=100)
    return judge(
        given, Training() if given.dimensions else training, clusters, config, Progress(quiet=True), corpus
    )


@pytest.mark.parametrize("form", FORMS)
def test_every_figure_is_a_number_or_left_out(form: str) -> None:
    random = np.random.default_rng(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(12):
            given = rows(form, random)
            same = judged(given, given if given.labels else None)
            text = json.dumps(as_record(same), allow_nan=False)
            assert json.loads(text)["figures"]["rows"] == len(given)
            for figure in same.headlines:
                assert figure.interval.low <= figure.interval.high

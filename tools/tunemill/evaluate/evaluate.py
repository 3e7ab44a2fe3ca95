"""The evaluate stage: predictions in, a page and a JSON file out.

``judge`` is the same for predictions from elsewhere: it needs no artifact and no store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tunemill.errors import BadDataError
from tunemill.evaluate.answers import FreeAnswers, free_answers
from tunemill.evaluate.baselines import Training, majority, read_training, tfidf
from tunemill.evaluate.config import EvaluateConfig
from tunemill.evaluate.metrics import (
    Bootstrap,
    Classification,
    Confusion,
    Interval,
    classification,
    confusions,
    difference,
)
from tunemill.evaluate.predictions import Predictions, read_predictions
from tunemill.files import write_json, write_text
from tunemill.progress import Progress
from tunemill.work import Facts, Input, Work


@dataclass(frozen=True)
class Baseline:
    """A simple method's figures on the same rows."""

    name: str
    what: str
    """One sentence on how it answers."""
    accuracy: Interval
    macro_f1: Interval
    gain: Interval
    """Accuracy of the judged predictions minus its own, resampled in pairs."""


@dataclass(frozen=True)
class Judged:
    """Everything that a report says about predictions."""

    predictions: Predictions
    figures: Classification | FreeAnswers
    baselines: tuple[Baseline, ...]
    remarks: tuple[str, ...]
    """What a reader has to know about how the figures came about, one sentence each."""
    confusions: tuple[Confusion, ...]
    confidence: float


def evaluate(work: Work[EvaluateConfig]) -> Facts:
    """Judge the ``predictions`` input; baselines learn from the ``data`` input.

    Raises:
        BadDataError: an input is malformed, or a row cannot be judged.
    """
    from tunemill.evaluate.report import render

    data = work.inputs["data"].path
    predictions = read_predictions(work.inputs["predictions"].path)
    training = read_training(data) if predictions.labels else Training((), ())
    judged = judge(predictions, training, read_clusters(data, predictions), work.config, work.progress)
    provenance = _provenance(work.inputs)
    settings = work.config.model_dump(exclude={"quant"})
    record = {**as_record(judged), "settings": settings, "inputs": provenance}
    write_json(work.output / "report.json", record)
    write_text(work.output / "report.html", render(judged, provenance, settings, work.config))
    return facts(judged)


def judge(
    predictions: Predictions,
    training: Training,
    clusters: npt.NDArray[np.intp],
    config: EvaluateConfig,
    progress: Progress,
) -> Judged:
    """Compute every figure. ``clusters`` is as in ``Bootstrap``; rows alone give 0, 1, 2, …"""
    bootstrap = Bootstrap(config.bootstrap_rounds, config.confidence, config.seed, clusters)
    if not predictions.labels:
        figures = free_answers(predictions, bootstrap)
        return Judged(predictions, figures, (), _remarks(figures, bootstrap), (), config.confidence)
    found = classification(predictions, bootstrap)
    baselines, missing = _baselines(predictions, training, bootstrap, config, progress)
    remarks = (*_remarks(found, bootstrap), *missing)
    return Judged(predictions, found, baselines, remarks, tuple(confusions(predictions)), config.confidence)


def read_clusters(data: Path, predictions: Predictions) -> npt.NDArray[np.intp]:
    """Return ``(rows,)`` numbers of near-duplicate groups, each row alone where none are known.

    Raises:
        BadDataError: a data file is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    groups: dict[str, int] = {}
    for path in sorted(data.glob("*.parquet")):
        try:
            table = pyarrow.parquet.read_table(path, columns=["id", "group"])
        except (pyarrow.ArrowInvalid, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise BadDataError(f"{path.name} cannot be read ({reason}): run prepare again") from error
        rows = dict(zip(table["id"].to_pylist(), table["group"].to_pylist(), strict=True))
        if all(identifier in rows for identifier in predictions.ids):
            groups = rows
    keys = [groups.get(identifier, identifier) for identifier in predictions.ids]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], dtype=np.intp)


def facts(judged: Judged) -> Facts:
    """Return the figures that are kept with the artifact and shown by the pipeline."""
    figures = judged.figures
    if isinstance(figures, FreeAnswers):
        return {
            "rows": figures.rows,
            "errors": figures.errors,
            "exact_match": figures.exact_match.value,
            "exact_match_low": figures.exact_match.low,
            "exact_match_high": figures.exact_match.high,
            "token_f1": figures.token_f1.value,
        }
    return {
        "rows": figures.rows,
        "errors": figures.errors,
        "accuracy": figures.accuracy.value,
        "accuracy_low": figures.accuracy.low,
        "accuracy_high": figures.accuracy.high,
        "balanced_accuracy": figures.balanced_accuracy,
        "macro_f1": figures.macro_f1.value,
        **{f"{baseline.name}_accuracy": baseline.accuracy.value for baseline in judged.baselines},
        **{f"{baseline.name}_macro_f1": baseline.macro_f1.value for baseline in judged.baselines},
    }


def as_record(judged: Judged) -> dict[str, Any]:
    """Return the whole judgement as plain JSON values, rows left out."""
    return {
        "form": "label" if judged.predictions.labels else "text",
        "labels": list(judged.predictions.labels),
        "confidence": judged.confidence,
        "figures": asdict(judged.figures),
        "baselines": [asdict(baseline) for baseline in judged.baselines],
        "confusions": [asdict(confusion) for confusion in judged.confusions],
        "remarks": list(judged.remarks),
    }


def _baselines(
    predictions: Predictions,
    training: Training,
    bootstrap: Bootstrap,
    config: EvaluateConfig,
    progress: Progress,
) -> tuple[tuple[Baseline, ...], tuple[str, ...]]:
    if not training.labels:
        return (), ("There are no baselines, because the data has no labelled train split.",)
    answers: dict[str, tuple[str, Sequence[str] | None]] = {
        "majority": (
            "Always the label most frequent in the train split.",
            majority(training, len(predictions)),
        )
    }
    with progress.task("TF-IDF baseline", 1, "fits") as task:
        answers["tfidf"] = (
            "Logistic regression over TF-IDF of words and word pairs, learned from the train split.",
            tfidf(training, predictions.texts, config.tfidf_max_features, config.tfidf_max_rows),
        )
        task.advance()
    made, missing = [], []
    for name, (what, given) in answers.items():
        if given is None:
            missing.append("There is no TF-IDF baseline, because the train split holds too little to learn.")
        elif outside := set(given) - set(predictions.labels):
            raise BadDataError(
                f"the train split has the label {min(outside)!r}, outside the predictions' set"
            )
        else:
            made.append(_baseline(name, what, given, predictions, bootstrap))
    return tuple(made), tuple(missing)


def _baseline(
    name: str, what: str, answers: Sequence[str], predictions: Predictions, bootstrap: Bootstrap
) -> Baseline:
    count = len(predictions)
    own = Predictions(
        predictions.labels,
        predictions.ids,
        predictions.texts,
        predictions.golds,
        tuple(answers),
        (None,) * count,
        None,
    )
    figures = classification(own, bootstrap)
    gain = difference(predictions.golds, predictions.answers, answers, bootstrap)
    return Baseline(name, what, figures.accuracy, figures.macro_f1, gain)


def _remarks(figures: Classification | FreeAnswers, bootstrap: Bootstrap) -> tuple[str, ...]:
    clusters = int(bootstrap.clusters.max()) + 1
    drawn = (
        "single rows"
        if clusters == figures.rows
        else f"{clusters} groups of near-duplicates instead of single rows"
    )
    remarks = [
        f"Ranges are {bootstrap.confidence:.0%} percentile intervals over {bootstrap.rounds} bootstrap "
        f"resamples of {drawn} (seed {bootstrap.seed})."
    ]
    if figures.errors:
        remarks.append(f"{figures.errors} of {figures.rows} rows have no answer; they count as wrong.")
    if isinstance(figures, Classification):
        remarks.append("Averages over classes run over the labels that occur in gold or predictions.")
    return tuple(remarks)


def _provenance(inputs: Any) -> list[dict[str, Any]]:
    return [_input(role, one) for role, one in sorted(inputs.items())]


def _input(role: str, one: Input) -> dict[str, Any]:
    return {"role": role, "reference": one.reference, "content": one.content, "facts": dict(one.facts)}

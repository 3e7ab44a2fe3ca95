"""The evaluate stage: predictions in, a page, tables and a JSON file out.

``judge`` is the same for predictions from elsewhere: it needs no artifact and no store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tunemill.errors import BadDataError
from tunemill.evaluate import metrics, several
from tunemill.evaluate.agreement import agreement
from tunemill.evaluate.answers import free_answers
from tunemill.evaluate.baselines import Method, Tfidf, Training, answer, majority, read_training
from tunemill.evaluate.bootstrap import Bootstrap, Measure, clusters_of
from tunemill.evaluate.calibration import calibration
from tunemill.evaluate.config import EvaluateConfig
from tunemill.evaluate.figures import Baseline, Classification, FreeAnswers, Judged, SeveralLabels
from tunemill.evaluate.paired import compared, headlines, measures
from tunemill.evaluate.predictions import Predictions, read_corpus, read_predictions
from tunemill.evaluate.prepared import read_rows
from tunemill.evaluate.prevalence import prevalences
from tunemill.evaluate.ratings import ratings
from tunemill.progress import Progress
from tunemill.work import Facts, Input, Work

Measured = Mapping[str, Measure]


def evaluate(work: Work[EvaluateConfig]) -> Facts:
    """Judge the ``predictions`` input; baselines learn from the ``data`` input.

    Raises:
        BadDataError: an input is malformed, or a row cannot be judged.
    """
    from tunemill.evaluate.report import command_of, write

    data = work.inputs["data"].path
    predictions = read_predictions(work.inputs["predictions"].path)
    training = read_training(data, predictions.task)
    corpus = read_corpus(work.inputs["corpus"].path) if "corpus" in work.inputs else None
    clusters = read_clusters(data, predictions)
    judged = judge(predictions, training, clusters, work.config, work.progress, corpus)
    provenance = [_input(role, one) for role, one in sorted(work.inputs.items())]
    settings = work.config.model_dump(exclude={"quant"})
    command = command_of(provenance, work.config)
    write(work.output, judged, provenance, settings, command, work.config)
    return facts(judged)


def judge(
    predictions: Predictions,
    training: Training,
    clusters: npt.NDArray[np.intp],
    config: EvaluateConfig,
    progress: Progress,
    corpus: Predictions | None = None,
    others: Mapping[str, Predictions] | None = None,
) -> Judged:
    """Compute every figure. ``clusters`` is as in ``Bootstrap``; rows alone give 0, 1, 2, …

    ``corpus`` are predictions of the same task whose gold answers are not looked at: the rows that
    prevalences are corrected for. ``others`` are further models' answers to the same rows in the same
    order, by their names; they stand among the baselines.

    Raises:
        BadDataError: the corpus or the training rows have other labels.
    """
    if corpus is not None:
        _refuse_other(corpus, predictions)
    bootstrap = Bootstrap(config.bootstrap_rounds, config.confidence, config.seed, clusters)
    form, labelled = predictions.task.form, bool(predictions.labels)
    with progress.task("figures", 2, "parts") as task:
        measured = measures(predictions, bootstrap)
        figures = _figures(predictions, measured, bootstrap)
        task.advance()
        rated = predictions.task.ordered or predictions.task.dimensions
        levels = ratings(predictions, bootstrap) if rated else ()
        agreed = agreement(predictions, bootstrap) if form == "label" else None
        calibrated = calibration(predictions, bootstrap)
        common = prevalences(predictions, bootstrap, corpus) if labelled else None
        task.advance()
    baselines, missing = _baselines(predictions, training, measured, bootstrap, config, progress)
    rivals = [
        _baseline(name, OTHER.format(name), given, predictions, measured, bootstrap)
        for name, given in (others or {}).items()
    ]
    return Judged(
        predictions=predictions,
        headlines=headlines(measured, bootstrap),
        figures=figures,
        ratings=levels,
        agreement=agreed,
        calibration=calibrated,
        prevalences=common,
        baselines=(*baselines, *rivals),
        confusions=tuple(CONFUSIONS[form](predictions)) if labelled else (),
        remarks=(*_remarks(figures, predictions, bootstrap), *missing),
        confidence=config.confidence,
    )


CONFUSIONS = {"label": metrics.confusions, "labels": several.confusions}


def read_clusters(data: Path, predictions: Predictions) -> npt.NDArray[np.intp]:
    """Return ``(rows,)`` numbers of near-duplicate groups, each text alone where none are known.

    Raises:
        BadDataError: a data file is damaged.
    """
    groups: dict[tuple[str, str], int] = {}
    asked = list(zip(predictions.ids, predictions.texts, strict=True))  # splits may share ids, not both
    wanted = {one: one for one in asked}
    for path in sorted(data.glob("*.parquet")):
        found: dict[tuple[str, str], int] = {}
        for row in read_rows(path, ("id", "text", "group")):
            if one := wanted.get((row["id"], row["text"] or "")):
                found[one] = row["group"]
        if len(found) == len(wanted):
            groups = found
    items = predictions.items or predictions.ids
    group_of: dict[str, int | str] = {}  # rows of one text belong together whatever their groups
    for item, one in zip(items, asked, strict=True):
        group_of.setdefault(item, groups.get(one, item))
    return clusters_of([group_of[item] for item in items])


def facts(judged: Judged) -> Facts:
    """Return the figures that are kept with the artifact and shown by the pipeline."""
    found: Facts = {"rows": judged.figures.rows, "errors": judged.figures.errors}
    for figure in judged.headlines:
        found[figure.name] = figure.interval.value
        found[f"{figure.name}_low"], found[f"{figure.name}_high"] = figure.interval.low, figure.interval.high
    for baseline in judged.baselines:
        found |= {f"{baseline.name}_{figure.name}": figure.interval.value for figure in baseline.figures}
    return found


def as_record(judged: Judged) -> dict[str, Any]:
    """Return the whole judgement as plain JSON values, rows left out."""
    task = judged.predictions.task
    return {
        "form": task.form,
        "labels": list(task.labels),
        "confidence": judged.confidence,
        "headlines": {one.name: asdict(one.interval) for one in judged.headlines},
        "figures": asdict(judged.figures),
        "ratings": [asdict(rating) for rating in judged.ratings],
        "agreement": asdict(judged.agreement) if judged.agreement else None,
        "calibration": asdict(judged.calibration) if judged.calibration else None,
        "prevalences": asdict(judged.prevalences) if judged.prevalences else None,
        "baselines": [asdict(baseline) for baseline in judged.baselines],
        "confusions": [
            {key: value for key, value in asdict(confusion).items() if key != "rows"}
            for confusion in judged.confusions
        ],
        "remarks": list(judged.remarks),
    }


def _refuse_other(corpus: Predictions, predictions: Predictions) -> None:
    """Raise ``BadDataError`` where a corpus is of another task than the judged rows."""
    here, there = (one.task for one in (predictions, corpus))
    if (there.form, there.labels) != (here.form, here.labels):
        raise BadDataError("the corpus was answered with other labels: take predictions of the same task")
    if unknown := set(corpus.dimensions or (None,)) ^ set(predictions.dimensions or (None,)):
        names = ", ".join(sorted(name or "none" for name in unknown))
        raise BadDataError(
            f"the corpus and the judged rows have different dimensions ({names}): give the same"
        )


def _figures(
    predictions: Predictions, measured: Measured, bootstrap: Bootstrap
) -> Classification | SeveralLabels | FreeAnswers:
    if predictions.task.form == "labels":
        return several.several_labels(predictions, measured, bootstrap)
    if predictions.task.form == "text":
        return free_answers(predictions, measured, bootstrap)
    return metrics.classification(predictions, measured, bootstrap)


def _baselines(
    predictions: Predictions,
    training: Training,
    measured: Measured,
    bootstrap: Bootstrap,
    config: EvaluateConfig,
    progress: Progress,
) -> tuple[tuple[Baseline, ...], tuple[str, ...]]:
    """Return the baselines, and of each that there is not a sentence why."""
    if not predictions.labels:
        return (), ()
    if not training.labels:
        return (), ("There is no majority or TF-IDF baseline, because there is no labelled train split.",)
    made, missing = [], []
    with progress.task("baselines", len(BASELINES), "methods") as task:
        for name, what in BASELINES.items():
            given = answer(_method(name, predictions, config), training, predictions)
            if given is None:
                missing.append(f"There is no baseline {name}: the train split holds too little to learn.")
            else:
                made.append(_baseline(name, what, given, predictions, measured, bootstrap))
            task.advance()
    return tuple(made), tuple(missing)


OTHER = "The answers of {}."
BASELINES = {
    "majority": "Always the answer most frequent in the train split.",
    "tfidf": "Logistic regression over TF-IDF of words and word pairs, learned from the train split.",
}


def _method(name: str, predictions: Predictions, config: EvaluateConfig) -> Method:
    if name == "majority":
        return majority
    several_labels = predictions.task.form == "labels"
    most = predictions.task.max_labels if several_labels else 1
    return Tfidf(config.tfidf_max_features, config.tfidf_max_rows, most, several_labels)


def _baseline(
    name: str,
    what: str,
    given: Predictions,
    predictions: Predictions,
    measured: Measured,
    bootstrap: Bootstrap,
) -> Baseline:
    own = measures(given, bootstrap)
    paired = compared(predictions, given, (measured, own), bootstrap)
    return Baseline(name, what, headlines(own, bootstrap), paired)


def _remarks(
    figures: Classification | SeveralLabels | FreeAnswers, predictions: Predictions, bootstrap: Bootstrap
) -> tuple[str, ...]:
    units = "texts" if predictions.items else "rows"
    alone = len(set(predictions.items)) if predictions.items else figures.rows
    drawn = (
        f"single {units}"
        if bootstrap.size == alone
        else f"{bootstrap.size} groups of near-duplicates instead of single {units}"
    )
    remarks = [
        f"Ranges are {bootstrap.confidence:.0%} percentile intervals over {bootstrap.rounds} bootstrap "
        f"resamples of {drawn} (seed {bootstrap.seed})."
    ]
    if figures.errors:
        remarks.append(f"{figures.errors} of {figures.rows} rows have no answer; they count as wrong.")
        if predictions.task.ordered:
            remarks.append("Distances between levels are those of rows with an answer.")
    if predictions.labels:
        remarks.append("Averages over classes run over the labels that occur in gold or predictions.")
    return tuple(remarks)


def _input(role: str, one: Input) -> dict[str, Any]:
    return {
        "role": role,
        "reference": one.reference,
        "content": one.content,
        "facts": dict(one.facts),
        "ancestors": list(one.ancestors),
    }

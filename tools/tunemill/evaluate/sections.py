"""What a report shows of each kind of figure: a section of plots and tables, or none where it is absent."""

from __future__ import annotations

from tunemill.evaluate import plots
from tunemill.evaluate.config import EvaluateConfig
from tunemill.evaluate.figures import (
    Baseline,
    Classification,
    Confusion,
    Figure,
    FreeAnswers,
    Interval,
    Judged,
    Paired,
    PerClass,
    Prevalence,
    Rating,
    SeveralLabels,
)
from tunemill.evaluate.page import Block, Heading, Listing, Picture, Quote, Section, Words
from tunemill.evaluate.plots import Mark, Point, Row
from tunemill.evaluate.tables import COUNT, NAME, NUMBER, PERCENT, POINTS, SHARE, Column, Table, written

TEXT_SHOWN = 280  # characters of an example text
MATRIX_MOST = 60  # labels; a larger plot is unreadable, and its figures are in report.json
ROWS_SHOWN = 20  # rows without an answer, or with a wrong free one
NAMES = {"majority": "Majority class", "tfidf": "TF-IDF + logistic regression"}
OURS = "These predictions"
PERCENTAGES = ("accuracy", "exact_match", "any_overlap")
LEVELS = ("mean_absolute_error",)
"""Figures that are no share: their differences are said in their own unit."""


def kind_of(name: str) -> str:
    """Return how a headline figure is written."""
    return PERCENT if name in PERCENTAGES else SHARE


def headlines(judged: Judged) -> Section:
    """Show every headline figure, beside the baselines where there are any."""
    shown = [figure for figure in judged.headlines if figure.name not in LEVELS]
    plot = plots.rows(
        "figures",
        "Figures with their ranges",
        [Row(one.title, (_ranged(one.interval),), written(kind_of(one.name), one.interval)) for one in shown],
    )
    table = Table(
        "headline",
        f"Headline figures with {judged.confidence:.0%} ranges.",
        (Column("figure", "Figure", NAME), Column("value", "Value", SHARE)),
        (*((figure.title, figure.interval) for figure in judged.headlines), *_further(judged)),
    )
    remarks = [Words(remark, soft=True) for remark in judged.remarks]
    return Section("figures", "Figures with their ranges", (Picture(plot), Listing(table), *remarks))


def _further(judged: Judged) -> list[tuple[str, float]]:
    """Return figures that have no range."""
    figures = judged.figures
    if isinstance(figures, Classification):
        top = [(f"Gold among the {k} most probable", share) for k, share in figures.top.items()]
        return [("Micro F1", figures.micro_f1), *top]
    if isinstance(figures, SeveralLabels):
        sizes = [("True labels of a row", figures.gold_size), ("Predicted ones", figures.predicted_size)]
        return [("Weighted F1", figures.weighted_f1), *sizes]
    return []


def baselines(judged: Judged) -> Section | None:
    """Set the predictions beside simple methods on the same rows."""
    if not judged.baselines:
        return None
    main = judged.headlines[0]
    bars = [Row(OURS, (_ranged(main.interval),), written(kind_of(main.name), main.interval))]
    for baseline in judged.baselines:
        own = _same(main, baseline)
        bars.append(
            Row(
                NAMES.get(baseline.name, baseline.name),
                (_ranged(own, "other"),),
                written(kind_of(main.name), own),
            )
        )
    what = f"{main.title} beside other methods"
    names = [figure for figure in judged.headlines if figure.name not in LEVELS][:2]
    columns = (
        Column("method", "Method", NAME),
        *(Column(figure.name, figure.title, kind_of(figure.name)) for figure in names),
        *PAIRED,
    )
    lines: list[tuple[object, ...]] = [(OURS, *(figure.interval for figure in names), *[None] * len(PAIRED))]
    for baseline in judged.baselines:
        cells = (_same(figure, baseline) for figure in names)
        lines.append((NAMES.get(baseline.name, baseline.name), *cells, *paired_cells(baseline.paired)))
    told = [Words(f"{NAMES.get(one.name, one.name)}: {one.what}", soft=True) for one in judged.baselines]
    table = Table(
        "baselines", f"{what}; differences are these predictions minus the method.", columns, tuple(lines)
    )
    picture = Picture(plots.rows("baselines-plot", what, bars))
    said = (*told, Words(MCNEMAR, soft=True))
    return Section("baselines", "Beside the baselines", (picture, Listing(table), *said))


PAIRED = (
    Column("difference", "Ahead by, points", POINTS),
    Column("only_first", "Only ours right", COUNT),
    Column("only_second", "Only it right", COUNT),
    Column("p_value", "McNemar's p", NUMBER),
)
MCNEMAR = (
    "Differences are resampled in pairs, the same rows for both. McNemar's exact test asks whether the rows "
    "that only one has right fall on both sides equally often; rows that belong together change sides "
    "together."
)


def paired_cells(paired: Paired) -> tuple[object, ...]:
    """Return the cells of a comparison, under the columns of ``PAIRED``."""
    first = paired.differences[0].interval if paired.differences else None
    return first, paired.only_first, paired.only_second, paired.p_value


def classes(judged: Judged) -> Section | None:
    """Show each label's figures with its counts."""
    figures = judged.figures
    if isinstance(figures, FreeAnswers):
        return None
    bars = [Row(one.label, (Mark(one.f1),), f"{one.f1:.2f}, {one.support} rows") for one in figures.per_class]
    table = Table(
        "classes",
        "Precision, recall and F1 of each label; rows that have it, and rows it was predicted for.",
        (
            Column("label", "Label", NAME),
            Column("precision", "Precision", SHARE),
            Column("recall", "Recall", SHARE),
            Column("f1", "F1", SHARE),
            Column("support", "Rows", COUNT),
            Column("predicted", "Predicted", COUNT),
        ),
        tuple(map(_class_cells, figures.per_class)),
    )
    return Section(
        "classes",
        "Each label",
        (Picture(plots.rows("classes-plot", "F1 of each label with its rows", bars)), Listing(table)),
    )


def _class_cells(one: PerClass) -> tuple[object, ...]:
    return one.label, one.precision, one.recall, one.f1, one.support, one.predicted


def confusion(judged: Judged) -> Section | None:
    """Draw what was taken for what."""
    figures = judged.figures
    if not isinstance(figures, Classification):
        return None
    names = [one.label for one in figures.per_class]
    if len(names) > MATRIX_MOST:
        told = Words(
            f"The matrix of {len(names)} labels is in report.json; the most frequent confusions follow."
        )
        return Section("confusion", "What was taken for what", (told,))
    worst = judged.confusions[0] if judged.confusions else None
    most = f"{worst.gold} taken for {worst.predicted}, {worst.count} times" if worst else "there is none"
    drawn = plots.matrix(
        "matrix",
        names,
        figures.matrix,
        figures.errors > 0,
        "Rows are gold labels, columns predicted ones in the same order; stronger colour is a larger share "
        f"of the row. Most frequent confusion: {most}.",
    )
    caption = "Rows: gold. Columns: predicted, in the same order"
    caption += "; the last column: no answer. " if figures.errors else ". "
    caption += "Stronger colour: a larger share of the row."
    legend = (("ours", "right"), ("wrong", "wrong"))
    return Section("confusion", "What was taken for what", (Picture(drawn, caption, legend),))


def worst(judged: Judged, config: EvaluateConfig) -> Section | None:
    """Show the most frequent confusions with the texts that the model was surest of."""
    if isinstance(judged.figures, FreeAnswers):
        return None
    several = isinstance(judged.figures, SeveralLabels)
    blocks: list[Block] = []
    for one in judged.confusions[: config.confusions]:
        taken = f"missed, {one.predicted} predicted" if several else f"taken for {one.predicted}"
        blocks.append(Heading(f"{one.gold} {taken}"))
        rows = f"{one.count} row{'s' if one.count > 1 else ''}, {100 * one.share:.1f} % of {one.gold}."
        blocks.append(Words(rows, soft=True))
        blocks += _examples(judged, one, config.examples)
    return Section("worst", "Worst confusions", tuple(blocks) or (Words("There is none."),))


def _examples(judged: Judged, one: Confusion, most: int) -> list[Quote]:
    """Return the rows of a confusion that the model was surest of, in the data's order when unknown."""
    given, shares = judged.predictions, judged.predictions.probabilities
    rows = list(one.rows)
    if shares is not None:
        rows.sort(key=lambda row: -float(shares[row].max()))
    sure = [f" · probability {float(shares[row].max()):.3f}" if shares is not None else "" for row in rows]
    pairs = list(zip(rows, sure, strict=True))[:most]
    return [
        Quote(shortened(given.texts[row]), f"{given.ids[row]}{said}")
        for row, said in pairs
        if given.texts[row]
    ]


def answers(judged: Judged) -> Section | None:
    """Show free answers by their kind, and wrong ones beside the gold answer."""
    figures = judged.figures
    if not isinstance(figures, FreeAnswers):
        return None
    blocks: list[Block] = []
    if figures.by_kind:
        columns = (
            Column("kind", "Answer", NAME),
            Column("rows", "Rows", COUNT),
            Column("exact_match", "Exact match", PERCENT),
            Column("f1", "F1", SHARE),
        )
        kinds = tuple((one.name, one.rows, one.exact_match, one.f1) for one in figures.by_kind)
        blocks.append(Listing(Table("kinds", "By the kind of the gold answer.", columns, kinds)))
    given = judged.predictions
    wrong = [
        Quote(
            shortened(given.texts[row]),
            f"{given.ids[row]} · gold: {shortened(gold)} · answer: {shortened(answer)}",
        )
        for row, (gold, answer) in enumerate(zip(given.golds, given.answers, strict=True))
        if answer is not None and answer.split() != gold.split()
    ]
    blocks.append(Heading(f"Answers in other words than gold, {min(len(wrong), ROWS_SHOWN)} of {len(wrong)}"))
    return Section("answers", "Answers", (*blocks, *wrong[:ROWS_SHOWN]))


def dimensions(judged: Judged) -> Section | None:
    """Show agreement on each dimension, and how far off the levels are."""
    if not judged.ratings:
        return None
    ordered = judged.ratings[0].mean_absolute_error is not None
    bars = [
        Row(
            _dimension(one), (_ranged(one.accuracy, "ours" if one.dimension else "other"),), _rating_note(one)
        )
        for one in judged.ratings
    ]
    columns = [
        Column("dimension", "Dimension", NAME),
        Column("rows", "Rows", COUNT),
        Column("accuracy", "Agreement", PERCENT),
        Column("cohen_kappa", "Cohen's κ", SHARE),
    ]
    if ordered:
        columns += [
            Column("mean_absolute_error", "Mean distance, levels", SHARE),
            Column("weighted_kappa", "Weighted κ", SHARE),
            Column("bias", "Too high by, levels", SHARE),
        ]
    lines = tuple(_rating_cells(one)[: len(columns)] for one in judged.ratings)
    told = "Agreement with gold" + (
        ", and the distance between levels, neighbours being 1 apart." if ordered else "."
    )
    picture = Picture(plots.rows("dimensions-plot", "Agreement on each dimension", bars))
    table = Listing(Table("dimensions", told, tuple(columns), lines))
    return Section("dimensions", "Each dimension" if len(bars) > 1 else "As levels", (picture, table))


def _dimension(rating: Rating) -> str:
    return rating.dimension or "All rows together"


def _rating_note(one: Rating) -> str:
    distance = f", {one.mean_absolute_error.value:.2f} levels off" if one.mean_absolute_error else ""
    return f"{written(PERCENT, one.accuracy)}{distance}"


def _rating_cells(one: Rating) -> tuple[object, ...]:
    agreement = (_dimension(one), one.rows, one.accuracy, one.cohen_kappa)
    return (*agreement, one.mean_absolute_error, one.weighted_kappa, one.bias)


def calibration(judged: Judged) -> Section | None:
    """Show whether probabilities mean what they say."""
    found = judged.calibration
    if found is None:
        return None
    total = max(sum(one.rows for one in found.bins), 1)
    points = [
        Point(one.confidence, one.accuracy.value, one.accuracy.low, one.accuracy.high, one.rows / total)
        for one in found.bins
    ]
    picture = Picture(
        plots.reliability("reliability", points, [one.rows for one in found.bins]),
        "Across: probability that the model gave. Upwards: share of right ones. On the dashed line both are "
        "the same; below it the model is too sure. Larger dots hold more rows.",
    )
    columns = (
        Column("low", "Above", SHARE),
        Column("high", "Up to", SHARE),
        Column("rows", "Rows", COUNT),
        Column("confidence", "Mean probability", SHARE),
        Column("accuracy", "Right", PERCENT),
    )
    lines = tuple((one.low, one.high, one.rows, one.confidence, one.accuracy) for one in found.bins)
    error = found.expected_calibration_error
    said = [f"Expected calibration error {written(SHARE, error)} ({error.low:.3f} to {error.high:.3f})"]
    said.append(f"Brier score {found.brier_score:.3f}")
    said += [] if found.log_loss is None else [f"log loss {found.log_loss:.3f} nats"]
    if found.most_pruned:
        said.append(f"each probability is off by up to {found.most_pruned:.2g} (max_pruned)")
    table = Table("calibration", f"Probabilities of each {found.what}, in bins.", columns, lines)
    return Section(
        "calibration", "Whether probabilities hold", (Words(", ".join(said) + "."), picture, Listing(table))
    )


def agreement(judged: Judged) -> Section | None:
    """Show the model among the coders."""
    found = judged.agreement
    if found is None:
        return None
    columns = [
        Column("first", "One", NAME),
        Column("second", "Other", NAME),
        Column("rows", "Rows", COUNT),
        Column("accuracy", "Agree", PERCENT),
        Column("cohen_kappa", "Cohen's κ", SHARE),
    ]
    if any(pair.weighted_kappa for pair in found.pairs):
        columns.append(Column("weighted_kappa", "Weighted κ", SHARE))
    cells = [
        (pair.first, pair.second, pair.rows, pair.accuracy, pair.cohen_kappa, pair.weighted_kappa)
        for pair in found.pairs
    ]
    lines = tuple(row[: len(columns)] for row in cells)
    told = []
    if found.alpha:
        kind = found.level_of_measurement
        told.append(f"Krippendorff's alpha ({kind}) of all of them: {_said(found.alpha)}")
    if found.coders_alpha:
        told.append(f"Of the coders alone: {_said(found.coders_alpha)}")
    table = Table("agreement", "Agreement of each two.", tuple(columns), lines)
    return Section(
        "agreement", "Agreement with the coders", (*(Words(f"{one}.") for one in told), Listing(table))
    )


def prevalence(judged: Judged) -> Section | None:
    """Show how common each label is, by gold, as counted, and corrected."""
    found = judged.prevalences
    if found is None:
        return None
    top = max([0.01, *(mark.high or mark.value for one in found.labels for mark in _prevalence_marks(one))])
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25) if top <= 4 * step or step == 0.25)
    axis = plots.Axis(0, 4 * step, tuple(step * n for n in range(5)))
    shown = [Row(_labelled(one), _prevalence_marks(one)) for one in found.labels]
    corrected = (("wrong", "corrected for the errors seen on the judged rows"),) if found.corpus else ()
    legend = (("ours", "predicted"), ("other", "gold"), *corrected)
    plot = Picture(plots.rows("prevalence-plot", "How common each label is", shown, axis), legend=legend)
    columns = [
        Column("label", "Label", NAME),
        Column("gold", "Gold", PERCENT),
        Column("counted", "Predicted", PERCENT),
    ]
    columns += [Column("corrected", "Corrected", PERCENT)] if found.corpus else []
    lines = tuple(
        (_labelled(one), one.gold, one.counted, one.corrected)[: len(columns)] for one in found.labels
    )
    where = "rows of the corpus" if found.corpus else "judged rows"
    told = f"Share of each label among {found.rows} {where}" + (
        f", corrected by {found.method}." if found.corpus else "."
    )
    table = Listing(Table("prevalence", told, tuple(columns), lines))
    return Section(
        "prevalence", "How common each label is", (plot, table) if len(shown) <= MATRIX_MOST else (table,)
    )


def _prevalence_marks(one: Prevalence) -> tuple[Mark, ...]:
    marks = (_ranged(one.counted), Mark(one.gold, shape="diamond", colour="other"))
    if one.corrected is None:
        return marks
    return (
        *marks,
        Mark(one.corrected.value, one.corrected.low, one.corrected.high, "dot", "wrong", below=True),
    )


def _labelled(one: Prevalence) -> str:
    return f"{one.dimension}: {one.label}" if one.dimension else one.label


def failed(judged: Judged) -> Section | None:
    """List the rows without an answer, with the reason."""
    given = judged.predictions
    rows = tuple((row, error) for row, error in zip(given.ids, given.errors, strict=True) if error)
    if not rows:
        return None
    columns = (Column("id", "Row", NAME), Column("error", "Why", NAME))
    more = f" The first {ROWS_SHOWN} of {len(rows)}." if len(rows) > ROWS_SHOWN else ""
    table = Table("errors", f"They count as wrong.{more}", columns, rows[:ROWS_SHOWN])
    return Section("errors", "Rows without an answer", (Listing(table),))


def shortened(text: str) -> str:
    """Return a text on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= TEXT_SHOWN else line[: TEXT_SHOWN - 1].rstrip() + "…"


def _ranged(interval: Interval, colour: str = "ours") -> Mark:
    return Mark(interval.value, interval.low, interval.high, colour=colour)


def _same(figure: Figure, baseline: Baseline) -> Interval:
    return next(one.interval for one in baseline.figures if one.name == figure.name)


def _said(interval: Interval) -> str:
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def present(*sections: Section | None) -> tuple[Section, ...]:
    """Return those that apply."""
    return tuple(section for section in sections if section is not None)

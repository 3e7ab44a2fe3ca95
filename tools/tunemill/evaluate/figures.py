"""What a report says: every figure of merit as a frozen value, whichever form the answers have.

The modules beside this one compute them, the page and the exports render them. Names are
scikit-learn's. A share lies in [0, 1]; kappa and alpha in [-1, 1], 1 being perfect agreement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tunemill.evaluate.predictions import Predictions


@dataclass(frozen=True)
class Interval:
    """A figure with the range that most bootstrap resamples fall into."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Figure:
    """One headline figure."""

    name: str
    """Key in report.json and in the artifact's facts, such as ``macro_f1``."""
    title: str
    """For people, such as ``Macro F1``."""
    interval: Interval


@dataclass(frozen=True)
class PerClass:
    """One label's figures; of a row with several labels each counts for itself."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    """Rows whose gold label it is."""
    predicted: int
    """Rows it was predicted for."""


@dataclass(frozen=True)
class Confusion:
    """A pair of labels that was taken for each other in one direction."""

    gold: str
    predicted: str
    count: int
    share: float
    """Of the gold label's rows."""
    rows: tuple[int, ...] = ()
    """Numbers of the rows in ``Predictions``, in their order; left out of report.json."""


@dataclass(frozen=True)
class Classification:
    """Figures of answers that are one label of the set."""

    rows: int
    errors: int
    """Rows without an answer; they count as wrong."""
    accuracy: Interval
    macro_f1: Interval
    balanced_accuracy: Interval
    micro_f1: float
    weighted_f1: Interval
    top: Mapping[int, float]
    """k to the share of rows whose gold label is among the k most probable."""
    per_class: tuple[PerClass, ...]
    matrix: tuple[tuple[int, ...], ...]
    """Gold (rows) by predicted (columns), in the labels' order; the last column: no answer."""


@dataclass(frozen=True)
class SeveralLabels:
    """Figures of answers that are up to ``max_labels`` labels of the set."""

    rows: int
    errors: int
    """Rows without an answer; they count as an empty set."""
    exact_match: Interval
    """Share of rows whose predicted set is the gold set (scikit-learn's subset accuracy)."""
    any_overlap: Interval
    """Share of rows with one true label at least among those predicted."""
    jaccard: Interval
    """Mean over rows of intersection over union."""
    micro_f1: Interval
    macro_f1: Interval
    weighted_f1: float
    gold_size: float
    """Mean number of true labels of a row."""
    predicted_size: float
    per_class: tuple[PerClass, ...]


@dataclass(frozen=True)
class AnswerKind:
    """Free answers of one kind: ``number``, ``span``, ``spans``, by the gold answer."""

    name: str
    rows: int
    exact_match: Interval
    f1: Interval


@dataclass(frozen=True)
class FreeAnswers:
    """Figures of free answers."""

    rows: int
    errors: int
    """Rows without an answer; they score 0."""
    answer_kind: str
    """``text``: compared as in SQuAD; ``numbers-and-spans``: as in TAT-QA."""
    exact_match: Interval
    f1: Interval
    """Over words; for ``numbers-and-spans`` TAT-QA's numeracy-aware F1."""
    by_kind: tuple[AnswerKind, ...]
    """For ``numbers-and-spans`` alone."""


@dataclass(frozen=True)
class Rating:
    """Figures of one dimension, or of all together."""

    dimension: str | None
    """None: all rows together."""
    rows: int
    errors: int
    accuracy: Interval
    """Share of rows on which gold and prediction agree."""
    cohen_kappa: Interval | None
    """None where everything has one label, so that chance alone would agree."""
    mean_absolute_error: Interval | None
    """In levels, over rows with an answer; None unless the labels are ordered."""
    weighted_kappa: Interval | None
    """Cohen's kappa with quadratic weights, over rows with an answer; None unless ordered."""
    bias: Interval | None
    """Mean of predicted minus gold level; above 0 the predictions are too high."""


@dataclass(frozen=True)
class Pair:
    """Agreement of two coders, one of whom may be the model."""

    first: str
    second: str
    rows: int
    """Rows that both coded."""
    accuracy: Interval
    """Share of them on which they agree."""
    cohen_kappa: Interval | None
    weighted_kappa: Interval | None
    """With quadratic weights; None unless the labels are ordered."""


@dataclass(frozen=True)
class Agreement:
    """How far the model agrees with the coders, and they with each other."""

    level_of_measurement: str
    """``nominal`` or ``ordinal``: how alpha weighs a disagreement."""
    pairs: tuple[Pair, ...]
    """The model with gold first, then with each coder, then the coders with each other."""
    alpha: Interval | None
    """Krippendorff's alpha of all of them: gold where there are no coders, and the model."""
    coders_alpha: Interval | None
    """Of the coders alone; None with fewer than two. The model cannot be asked for more than this."""


@dataclass(frozen=True)
class Bin:
    """Answers whose probabilities lie in ``(low, high]``."""

    low: float
    high: float
    rows: int
    confidence: float
    """Mean probability."""
    accuracy: Interval
    """Share of right ones, with Wilson's interval."""


@dataclass(frozen=True)
class Calibration:
    """Whether probabilities mean what they say."""

    what: str
    """What one point is: ``answer``, or ``label`` of a row where there may be several."""
    rows: int
    expected_calibration_error: Interval
    """Mean distance of confidence and accuracy over bins, weighted by their rows."""
    brier_score: float
    """Mean squared distance of probabilities and truth: scikit-learn's ``brier_score_loss``."""
    log_loss: float | None
    """Mean nats that the true label was given too little; None where there may be several labels."""
    most_pruned: float
    """How far off a probability may be, because ``infer`` left uncomputed what is improbable."""
    bins: tuple[Bin, ...]
    """Those that hold rows."""


@dataclass(frozen=True)
class Prevalence:
    """How common one label is."""

    label: str
    dimension: str | None
    gold: float
    """Share of judged rows whose gold label it is."""
    counted: Interval
    """Share of rows it was predicted for: of the corpus where one is given, else of the judged rows."""
    corrected: Interval | None
    """The corpus's share, corrected for the errors seen on the judged rows; None without a corpus."""


@dataclass(frozen=True)
class Prevalences:
    """How common the labels are."""

    rows: int
    """Rows that were counted."""
    corpus: bool
    """They are a corpus of their own, not the judged rows."""
    method: str
    """``confusion-matrix`` or ``rogan-gladen``: how ``corrected`` was computed."""
    labels: tuple[Prevalence, ...]


@dataclass(frozen=True)
class Paired:
    """Two sets of predictions on the same rows, the first minus the second."""

    rows: int
    differences: tuple[Figure, ...]
    """Of each headline figure that both have, resampled in pairs."""
    only_first: int
    """Rows that the first alone has right."""
    only_second: int
    p_value: float
    """McNemar's exact test that both are right equally often; rows of one cluster change sides together."""


@dataclass(frozen=True)
class Baseline:
    """A simple method's figures on the same rows."""

    name: str
    what: str
    """One sentence on how it answers."""
    figures: tuple[Figure, ...]
    """Named as in ``Judged.headlines``."""
    paired: Paired
    """The judged predictions minus the baseline."""


@dataclass(frozen=True)
class Judged:
    """Everything that a report says about predictions; what does not apply is None or empty."""

    predictions: Predictions
    headlines: tuple[Figure, ...]
    """The main figure first, then those that stand beside it, for every form."""
    figures: Classification | SeveralLabels | FreeAnswers
    ratings: tuple[Rating, ...]
    """All rows together, then each dimension; only where labels are ordered or texts have dimensions."""
    agreement: Agreement | None
    calibration: Calibration | None
    """Only where there are probabilities."""
    prevalences: Prevalences | None
    baselines: tuple[Baseline, ...]
    confusions: tuple[Confusion, ...]
    remarks: tuple[str, ...]
    """What a reader has to know about how the figures came about, one sentence each."""
    confidence: float
    """Share of resamples within an interval."""

"""What a model has to beat: always the commonest label, and TF-IDF with logistic regression.

Both learn from the train split the model was fine-tuned on and answer the very rows it answered,
so the figures stand side by side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunemill.errors import BadDataError


@dataclass(frozen=True)
class Training:
    """Texts with labels to learn from."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]


def read_training(data: Path) -> Training:
    """Read the labelled rows of the train split; none when there is no such file.

    Raises:
        BadDataError: the file is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    path = data / "train.parquet"
    if not path.exists():
        return Training((), ())
    try:
        table = pyarrow.parquet.read_table(path, columns=["text", "label"])
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise BadDataError(f"train.parquet cannot be read ({reason}): run prepare again") from error
    pairs = [
        (text, label)
        for text, label in zip(table["text"].to_pylist(), table["label"].to_pylist(), strict=True)
        if text and label
    ]
    return Training(tuple(text for text, _ in pairs), tuple(label for _, label in pairs))


def majority(training: Training, rows: int) -> list[str]:
    """Answer every row with the label most frequent in training, the first of equals by name."""
    counts = Counter(training.labels)
    best = min(counts, key=lambda label: (-counts[label], label))
    return [best] * rows


def tfidf(training: Training, texts: Sequence[str], max_features: int, max_rows: int) -> list[str] | None:
    """Answer by multinomial logistic regression over TF-IDF of words and word pairs.

    Returns None when the training rows do not hold two labels and any word.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    known = list(training.texts[:max_rows])
    labels = list(training.labels[:max_rows])
    if len(set(labels)) < 2 or not any(len(word) > 1 for text in known for word in text.split()):
        return None
    vectorizer = TfidfVectorizer(
        sublinear_tf=True, ngram_range=(1, 2), max_features=max_features, token_pattern=r"(?u)\w+"
    )
    # C=10: TF-IDF rows have length 1, for which scikit-learn's C=1 regularises too much
    model = LogisticRegression(C=10, tol=1e-3, max_iter=200)
    model.fit(vectorizer.fit_transform(known), labels)
    return [str(label) for label in model.predict(vectorizer.transform(list(texts)))]

"""What fetch and prepare may be told, and what they take and give.

Light on purpose: the command line imports it for ``--help``. Keys are spelled as in the Hub,
in transformers' ``LlamaConfig`` and in TRL, and mean the same in every stage that has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tunemill.work import Stage, StageConfig

MADE = "made"
"""``model_name_or_path`` of the model that is built and pretrained here."""

STDLIB = "stdlib"
"""``dataset_name`` of the demo's docstrings."""

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class FetchConfig(StageConfig):
    """Where base weights come from; the keys from ``vocab_size`` on are for ``made`` alone."""

    model_name_or_path: str = Field(
        min_length=1, description="Hub id, local directory, or 'made' for the tiny model trained here"
    )
    model_revision: str | None = Field(
        None, description="Commit on the Hub, 40 hex digits, so that the same bytes come again"
    )
    chat_template: str | None = Field(
        None, description="Jinja source of the chat template, in place of the model's own"
    )
    license: str | None = Field(None, description="Licence of the weights, kept in the provenance")
    seed: int = Field(42, ge=0, description="Seed of everything random")
    vocab_size: Positive = Field(4096, description="Tokens in the made model's vocabulary")
    hidden_size: Positive = Field(256, description="Width of the made model")
    intermediate_size: Positive = Field(768, description="Width of the made model's feed-forward layers")
    num_hidden_layers: Positive = Field(4, description="Layers of the made model")
    num_attention_heads: Positive = Field(4, description="Attention heads of the made model")
    num_key_value_heads: Positive = Field(4, description="Key and value heads of the made model")
    max_position_embeddings: Positive = Field(512, description="Context of the made model, in tokens")
    tie_word_embeddings: bool = Field(False, description="Share the made model's input and output embeddings")
    pretrain_epochs: float = Field(3.0, ge=0, description="Passes over the docstrings in pretraining")
    pretrain_learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of pretraining")
    pretrain_max_length: Positive = Field(256, description="Tokens in one pretraining sequence")
    pretrain_batch_size: Positive = Field(16, description="Sequences in one pretraining step")


class PrepareConfig(StageConfig):
    """Where examples come from, how they become prompts, and how they are split."""

    task: str | None = Field(None, description="Name of the task, kept in task.json")
    dataset_name: str = Field(
        min_length=1, description="'stdlib', a file, glob or directory here, or a dataset's id on the Hub"
    )
    dataset_config: str | None = Field(None, description="Configuration (subset) of a Hub dataset")
    dataset_revision: str | None = Field(None, description="Commit of a Hub dataset, 40 hex digits")
    dataset_train_split: str = Field("train", description="Split that the training rows come from")
    dataset_test_split: str | None = Field(None, description="Split given as the test set; else one is cut")
    dataset_license: str | None = Field(None, description="Licence of the data, for the data card")
    dataset_source: str | None = Field(None, description="Where the data came from, for the data card")
    test_files: tuple[str, ...] = Field((), description="Files or globs given as the test set")
    unlabelled_files: tuple[str, ...] = Field(
        (), description="Files or globs of texts without labels, for infer with split=unlabelled"
    )
    text_column: str | None = Field(None, description="Column of the text; recognised if not given")
    label_column: str | None = Field(None, description="Column of the gold label; recognised if not given")
    completion_column: str | None = Field(
        None, description="Column of the free answer, for tasks that have no labels"
    )
    id_column: str | None = Field(None, description="Column of the row's identifier; 'id' if there is one")
    group_column: str | None = Field(
        None, description="Column whose equal values are never split apart: a document, an author"
    )
    system_prompt: str | None = Field(None, description="System message of every prompt; may hold {labels}")
    prompt: str | None = Field(
        None,
        description="User message: {column} is that column's value, {labels} the labels, {dimension} and "
        "{description} what a row asks about; {{ is a brace",
    )
    labels: tuple[str, ...] | dict[str, str] | None = Field(
        None, description="Names of the labels, or a mapping of code to name; found in the data if not given"
    )
    ordered: bool = Field(False, description="The labels are levels, given from the lowest to the highest")
    max_labels: Positive | None = Field(
        None, description="Most labels of one text, where it may have several: a list, or names in one cell"
    )
    label_separator: str = Field("; ", description="What stands between several labels, in cells and answers")
    dimensions: tuple[str, ...] | dict[str, str] | None = Field(
        None,
        description="Columns of labels, each a dimension that every text is asked about in a row of its own; "
        "or a mapping of column to what {description} says of it",
    )
    answer_kind: Literal["text", "numbers-and-spans"] = Field(
        "text", description="How free answers are judged: as they stand, or as TAT-QA's numbers and spans"
    )
    max_length: Positive = Field(1024, description="Most tokens of prompt and completion together")
    test_size: Share = Field(0.2, description="Share of the rows held out as the test set")
    validation_size: Share = Field(0.0, description="Share of the rows held out for validation")
    near_duplicate_threshold: float = Field(
        0.8, gt=0, le=1, description="Jaccard similarity of word shingles from which two texts are one group"
    )
    seed: int = Field(42, ge=0, description="Seed of everything random")

    @field_validator("labels", mode="before")
    @classmethod
    def _as_text(cls, labels: Any) -> Any:
        """YAML reads codes as numbers; yes and no it reads as true and false, which is an error."""
        if isinstance(labels, Mapping):
            return {_label(code): _label(name) for code, name in labels.items()}
        return [_label(name) for name in labels] if isinstance(labels, list | tuple) else labels

    @model_validator(mode="after")
    def _consistent(self) -> PrepareConfig:
        if self.test_size + self.validation_size >= 1:
            raise ValueError("test_size and validation_size leave nothing to train on")
        if self.test_files and self.dataset_test_split:
            raise ValueError("test_files and dataset_test_split both name the test set: keep one")
        if self.label_column and self.completion_column:
            raise ValueError("label_column and completion_column exclude each other: keep one")
        return self

    @model_validator(mode="after")
    def _one_form(self) -> PrepareConfig:
        if self.ordered and not self.labels:
            raise ValueError("ordered needs labels: the levels, from the lowest to the highest")
        if not self.label_separator.strip():
            raise ValueError("label_separator is blank: take one that can be seen, such as ';'")
        if self.max_labels and self.completion_column:
            raise ValueError("max_labels and completion_column exclude each other: keep one")
        if self.answer_kind != "text" and (self.labels or self.max_labels or self.label_column):
            raise ValueError("answer_kind is of free answers: leave it out where there are labels")
        if self.dimensions is not None:
            self._check_dimensions(len(self.dimensions))
        return self

    def _check_dimensions(self, number: int) -> None:
        if self.label_column or self.completion_column or self.max_labels or self.answer_kind != "text":
            raise ValueError(
                "dimensions name the columns of the labels: leave out label_column, completion_column, "
                "max_labels and answer_kind"
            )
        if not number or len(set(self.dimensions or ())) < number:
            raise ValueError("dimensions is empty or names one twice")
        if "{dimension}" not in (self.prompt or "") and "{description}" not in (self.prompt or ""):
            raise ValueError(
                "dimensions need a prompt with {dimension}: else all of a text's rows ask the same"
            )


def _label(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"label {value} is a truth value: put yes, no, on and off in quotes")
    return str(value) if isinstance(value, int | float) else value


FETCH = Stage(
    name="fetch",
    summary="Get base weights from the Hub or a directory, or make the tiny model",
    config=FetchConfig,
    inputs={},
    output="base/{model}",
    kind="base",
    work="tunemill.data.fetch:fetch",
    check="tunemill.data.fetch:check",
    reads="tunemill.data.fetch:reads",
)

PREPARE = Stage(
    name="prepare",
    summary="Turn a dataset into prompts, split it, and write its data card",
    config=PrepareConfig,
    inputs={"base": "base/{model}"},
    output="{run}/data",
    kind="data",
    work="tunemill.data.prepare:prepare",
    check="tunemill.data.prepare:check",
    reads="tunemill.data.prepare:reads",
)

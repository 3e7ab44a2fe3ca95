"""Answers of the form ``text``: what the model writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tunemill.infer import generate
from tunemill.infer.classify import Question
from tunemill.infer.rows import Answer
from tunemill.infer.run import Run, common_beginning


def answer(run: Run, questions: Sequence[Question], numbers: Sequence[int]) -> Iterator[Answer]:
    """Yield the answer to each question, in order; ``numbers`` are the rows' places in the split."""
    config = run.config
    sampling = generate.Sampling(config.max_new_tokens, config.temperature, config.seed)
    prompts = [
        generate.Prompt(number, question.prompt) for number, question in zip(numbers, questions, strict=True)
    ]
    prefix = common_beginning([prompt.tokens for prompt in prompts])
    run.pool.share(prefix, generate.cells(prompts, sampling))
    for found in generate.generate(run.pool, run.model, prompts, sampling):
        yield Answer(found.text, ended=found.ended)

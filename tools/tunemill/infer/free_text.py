"""Answers of the form ``text``: what the model writes, held to a form where one is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace

from tunemill.infer import generate
from tunemill.infer.classify import Question
from tunemill.infer.config import InferConfig
from tunemill.infer.constraints import Constraint
from tunemill.infer.generate import Continuation
from tunemill.infer.grammar import Grammar
from tunemill.infer.rows import Answer
from tunemill.infer.run import Run, common_beginning


def answer(run: Run, questions: Sequence[Question], numbers: Sequence[int]) -> Iterator[tuple[int, Answer]]:
    """Yield each question's number and its answer; ``numbers`` are the rows' places in the split."""
    sampling, constraint = sampling_of(run.config), run.config.constraint
    prompts = [
        generate.Prompt(number, question.prompt) for number, question in zip(numbers, questions, strict=True)
    ]
    prefix = common_beginning([prompt.tokens for prompt in prompts])
    run.pool.share(prefix, generate.cells(prompts, sampling))
    with closing(Grammar(run.model, constraint.gbnf())) if constraint else nullcontext() as grammar:
        found = generate.generate(run.pool, run.model, prompts, sampling, grammar)
        for number, samples in enumerate(found):
            yield number, _answer(samples, constraint)


def sampling_of(config: InferConfig) -> generate.Sampling:
    """Return what the settings say about choosing tokens."""
    return generate.Sampling(
        config.max_new_tokens,
        config.temperature,
        config.seed,
        config.top_k,
        config.top_p,
        config.min_p,
        config.n,
        tuple(stop.encode() for stop in config.stop),
    )


def _answer(found: Sequence[Continuation], constraint: Constraint | None) -> Answer:
    """Take the first sample for the answer, and keep the others beside it."""
    first, others = found[0], found[1:]
    answer = (
        Answer(error=first.error)
        if first.error
        else Answer(_text(first, constraint), ended=first.ended, logprob=first.logprob)
    )
    if not others:
        return answer
    return replace(
        answer,
        samples=tuple(_text(other, constraint) for other in others),
        sample_logprobs=tuple(other.logprob for other in others),
    )


def _text(found: Continuation, constraint: Constraint | None) -> str | None:
    if found.error:
        return None
    return constraint.read(found.text) if constraint else found.text.strip()

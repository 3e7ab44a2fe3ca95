"""Flattens TAT-QA's files: one row per question, with its table and paragraphs as text.

TAT-QA (Zhu et al., 2021, arXiv 2105.07624) nests several questions under one table and the
paragraphs around it. An answer is a number, a text, or a list of texts (spans); as training
text, spans are joined by "; " and the scale ("million", "percent") follows the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tunemill.errors import BadDataError

SPANS = "; "


def is_tatqa(value: list[Any]) -> bool:
    """Tell whether a JSON list is of this structure, from its first entry."""
    return bool(value) and isinstance(value[0], dict) and {"table", "questions"} <= value[0].keys()


def rows(contexts: list[Any], name: str) -> Iterator[dict[str, Any]]:
    """Yield one row per question: uid, context, table, paragraphs, question, answer, scale ...

    ``context`` is the same for the questions of one table, so that a split can keep them together.

    Raises:
        BadDataError: an entry lacks its table, paragraphs or questions.
    """
    for number, context in enumerate(contexts, 1):
        try:
            uid, table = str(context["table"]["uid"]), _table(context["table"]["table"])
            ordered = sorted(context["paragraphs"], key=lambda paragraph: int(paragraph["order"]))
            paragraphs = "\n".join(str(paragraph["text"]) for paragraph in ordered)
            questions = [_question(question) for question in context["questions"]]
        except (KeyError, TypeError, ValueError) as error:
            raise BadDataError(
                f"{name} entry {number} is not as in TAT-QA: {type(error).__name__} {error}"
            ) from error
        for question in questions:
            yield {"context": uid, "table": table, "paragraphs": paragraphs, **question}


def _question(question: dict[str, Any]) -> dict[str, Any]:
    answer, scale = _answer(question["answer"]), str(question.get("scale") or "")
    return {
        "uid": str(question["uid"]),
        "question": str(question["question"]),
        "answer": answer,
        "scale": scale,
        "answer_with_scale": f"{answer} {scale}".strip(),
        "answer_type": str(question.get("answer_type", "")),
        "derivation": str(question.get("derivation", "")),
    }


def _answer(answer: Any) -> str:
    if isinstance(answer, list):
        return SPANS.join(str(span).strip() for span in answer)
    return str(answer)


def _table(cells: list[list[Any]]) -> str:
    """One line per row, cells between bars: no escaping, so that numbers keep their text."""
    return "\n".join(" | ".join(" ".join(str(cell).split()) for cell in row) for row in cells)

"""Whether a model can become a GGUF that answers as it was trained, found out before it is trained.

What decides that is known beforehand and costs seconds: whether llama.cpp's converter knows the
architecture and the tokenizer, whether llama.cpp then reads the same tokens, and whether the template in
the file gives others the text that training saw. The converter is run without weights
(``--vocab-only``), llama.cpp loads the vocabulary it writes, and both are held against transformers.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunemill.errors import BadDataError, ConfigurationError
from tunemill.gguf.child import Limits, fail, machine_memory, run
from tunemill.gguf.header import GgufHeader, read_gguf
from tunemill.gguf.library import Library
from tunemill.gguf.source import find_source
from tunemill.gguf.staging import stage_model
from tunemill.gguf.tokens import Probe, compare
from tunemill.prompting import Message, Prompting, read_prompting
from tunemill.tokenizer import load_tokenizer
from tunemill.work import Facts, Work

SECONDS = 600.0  # the largest vocabularies take half a minute on a slow machine
CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "Which topic?"},),
    ({"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Which topic?"}),
    (
        {"role": "user", "content": "  Two leading spaces,\n\nan empty line and <angles> "},
        {"role": "assistant", "content": "Health"},
        {"role": "user", "content": "naïve ☃ 😀 中文 'quotes' \"too\" 3.14159 we'll"},
    ),
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, and what was found."""

    subject: str
    fine: bool
    said: str

    def __str__(self) -> str:
        """Return it as one line."""
        return f"{'ok' if self.fine else 'NO'}  {self.subject}: {self.said}"


def preflight(model: Path, scratch: Path, stop: threading.Event) -> list[Finding]:
    """Look at everything that can be known without the weights; later findings need the earlier.

    Raises:
        BadDataError: the model's files are damaged, or it has no chat template.
        ConfigurationError: the converter is not installed.
    """
    prompting, tokenizer = read_prompting(model), load_tokenizer(model)
    try:
        header = _vocabulary(model, scratch, stop)
    except BadDataError as error:
        return [_refused(str(error))]
    pre = header.metadata.get("tokenizer.ggml.pre", "default")
    kind = header.metadata.get("tokenizer.ggml.model", "unknown")
    architecture = Finding("architecture", True, f"{header.architecture}, which llama.cpp converts")
    library = Library(scratch, stop)
    return [
        architecture,
        _tokens(library, header.path, prompting, tokenizer, f"{kind}, pre-tokenizer {pre}"),
        _template(library, header.path, prompting),
    ]


def refuse(findings: Sequence[Finding]) -> None:
    """Raise for the first finding that is not fine.

    Raises:
        BadDataError: there is one.
    """
    for finding in findings:
        if not finding.fine:
            raise BadDataError(f"{finding.subject} unfit for a GGUF of this model: {finding.said}")


def before_training(work: Work[Any]) -> Facts:
    """Refuse a base that cannot end as a GGUF; where the converter is not installed, say that and go on.

    Raises:
        BadDataError: training would come to nothing.
    """
    if not work.config.preflight:
        return {"preflight": "off"}
    try:
        find_source()
    except ConfigurationError as error:
        where = f"tunemill convert --check {work.inputs['base'].reference}"
        work.progress.say(
            f"not checked whether the model can become a GGUF ({error}): {where} does, elsewhere"
        )
        return {"preflight": "not checked: no converter"}
    findings = preflight(work.inputs["base"].path, work.scratch / "preflight", work.stop)
    refuse(findings)
    shutil.rmtree(work.scratch / "preflight")
    return {"preflight": [str(finding) for finding in findings]}


def _vocabulary(model: Path, scratch: Path, stop: threading.Event) -> GgufHeader:
    """Convert all but the weights."""
    scratch.mkdir(parents=True, exist_ok=True)
    staged = stage_model(model, scratch / "model-without-weights", weights=False)
    target = scratch / "vocabulary.gguf"
    script = str(find_source().directory / "convert_hf_to_gguf.py")
    limits = Limits(SECONDS, machine_memory())
    command = [script, str(staged), "--vocab-only", "--outfile", str(target)]
    ended = run(command, scratch / "converter", limits, stop)
    fail(ended, "llama.cpp's converter refuses it", limits)
    return read_gguf(target)


def _refused(said: str) -> Finding:
    subject = "tokenizer" if "okenizer" in said else "architecture"
    return Finding(subject, False, said)


def _tokens(library: Library, file: Path, prompting: Prompting, tokenizer: Any, kind: str) -> Finding:
    texts = [message["content"] for conversation in CONVERSATIONS for message in conversation]
    texts += [text for text in (_ours(prompting, one) for one in CONVERSATIONS) if text is not None]
    expected = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    probes = [Probe(f"text {number}", text) for number, text in enumerate(texts)]
    try:
        compare(probes, expected, library.tokenize(file, texts).value["ids"])
    except BadDataError as error:
        return Finding("tokenizer", False, f"{kind}: {error}")
    return Finding("tokenizer", True, f"{kind}; {len(texts)} texts have the same tokens in both engines")


def _template(library: Library, file: Path, prompting: Prompting) -> Finding:
    """Compare with llama-cpp-python's Jinja; what llama.cpp's own formatter makes of it is only told.

    That one knows templates by their look and trims what it formats, so it differs for many models that
    nothing is wrong with. A BOS that the tokenizer writes before the template's text is no difference.
    """
    answer = library.chat(file, CONVERSATIONS).value
    if answer["template"] is None:
        return Finding("chat template", False, "the GGUF has none, though the model has one")
    ours = [_ours(prompting, conversation) for conversation in CONVERSATIONS]
    theirs = [None if isinstance(text, dict) else text for text in answer["jinja"]]
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if _without(prompting, mine) != _without(prompting, other):
            said = (
                f"conversation {number} is {_shown(mine)} in training and {_shown(other)} in llama-cpp-python"
            )
            return Finding("chat template", False, said)
    alike = [
        other == mine.removeprefix(prompting.bos_token)
        for mine, other in zip(ours, answer["built_in"], strict=True)
        if mine is not None and other is not None
    ]
    built_in = "renders it alike" if all(alike) and alike else "renders it otherwise"
    built_in = built_in if alike else "does not know it"
    return Finding(
        "chat template", True, f"the same text in both engines; llama.cpp's built-in one {built_in}"
    )


def _ours(prompting: Prompting, conversation: Sequence[Message]) -> str | None:
    """Return the text of training, None where the template refuses the conversation."""
    try:
        return prompting.prompt(conversation)
    except BadDataError:
        return None


def _without(prompting: Prompting, text: str | None) -> str | None:
    return text if text is None else text.removeprefix(prompting.bos_token)


def _shown(text: str | None) -> str:
    return "refused" if text is None else repr(text[:120])

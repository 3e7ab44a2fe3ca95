"""The parity gate: a stage's output answers the probe set as its input did, or is not published.

Merge, convert and quantize each end with ``prove``. It compares the texts, the token ids and the
distributions with what came along with the input, writes what the next stage compares with, and stops
the stage where a limit is passed. What could not be compared is said and recorded, never skipped silently.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

from tunemill.errors import BadDataError
from tunemill.files import write_json
from tunemill.parity import distributions, probes
from tunemill.parity.compare import Comparison, Labels, compare
from tunemill.parity.config import Limits
from tunemill.parity.distributions import Distributions
from tunemill.parity.probes import Probe, Probes
from tunemill.progress import Progress
from tunemill.prompting import Prompting, read_prompting
from tunemill.work import Facts

FILE = "parity.json"
NONE, OFF, PASSED, OVERRIDDEN = "none", "off", "passed", "overridden"
"""Verdicts in an artifact's facts: nothing to compare with; not wanted; within the limits; beyond them."""
CAUSES: Mapping[str, str] = {
    "merge": "another base than the adapter was trained on, an adapter scaled wrongly (lora_alpha, "
    "use_rslora) or merged twice, or a tensor transposed or left out",
    "convert": "a shard of another run, a tensor damaged or transposed, or an architecture that llama.cpp "
    "computes otherwise",
    "quantize": "a damaged tensor, or a type too small for this model (take a larger one, or an importance "
    "matrix)",
}


@dataclass(frozen=True)
class Proof:
    """What is to be proved, and by which limits."""

    step: str
    source: Path
    """The input artifact's files."""
    output: Path
    """The new artifact's files; its prompting.json is there already."""
    limits: Limits
    wanted: bool
    """False where ``parity_probes`` is 0."""
    publish_anyway: bool


class Candidate(Protocol):
    """The model that a stage made."""

    def tokenize(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """Return token ids of texts as they are."""

    def measure(self, probes: Probes, tick: Callable[[], None]) -> Distributions:
        """Answer the probes; call ``tick`` after each."""


def prove(proof: Proof, candidate: Candidate, progress: Progress) -> Facts:
    """Compare a stage's output with its input; return the facts, with the verdict under ``parity``.

    Raises:
        BadDataError: it is beyond a limit and not to be published anyway, or the input's files are damaged.
    """
    if not (proof.source / probes.FILE).exists():
        reason = "the input has no probes.json; train with parity_probes=64 to make one"
        return unproved(proof.step, reason, progress)
    if not proof.wanted:
        progress.say(f"{proof.step}: parity is not checked, parity_probes=0")
        for name in (probes.FILE, distributions.FILE):
            shutil.copyfile(proof.source / name, proof.output / name)
        return {"parity": {"verdict": OFF}}
    chosen, reference = Probes.load(proof.source), Distributions.load(proof.source)
    asked = check_texts(chosen, read_prompting(proof.output), candidate.tokenize)
    asked = asked or check_tokens(chosen, candidate.tokenize)
    with progress.task(f"{proof.step} (parity)", len(chosen.probes), "probes") as task:
        found = candidate.measure(chosen, task.advance)
    comparison = compare(chosen, reference, found)
    beyond = judge(comparison, proof.limits, f"{proof.step}_")
    if beyond:
        beyond.append(place_and_causes(proof.step, chosen, comparison))
    say_table(proof, comparison, progress)
    return _conclude(proof, chosen, found, comparison, asked + beyond, progress)


def unproved(step: str, reason: str, progress: Progress) -> Facts:
    """Say and record that there is nothing to compare with."""
    progress.say(f"{step}: parity is not checked: {reason}")
    return {"parity": {"verdict": NONE, "reason": reason}}


def _conclude(
    proof: Proof,
    chosen: Probes,
    found: Distributions,
    comparison: Comparison,
    complaints: list[str],
    progress: Progress,
) -> Facts:
    verdict = OVERRIDDEN if complaints else PASSED
    if complaints:
        message = f"{proof.step}: parity is lost: {'; '.join(complaints)}"
        if not proof.publish_anyway:
            raise BadDataError(f"{message}; --publish-anyway publishes it with that on record")
        progress.say(f"{message}; published anyway")
    chosen.save(proof.output)
    found.save(proof.output)
    record = {"verdict": verdict, "complaints": complaints, "limits": asdict(proof.limits)}
    write_json(proof.output / FILE, {**record, "probe_set": chosen.digest, **comparison.as_json()})
    return {"parity": {"verdict": verdict, **headline(comparison), "complaints": complaints}}


def headline(comparison: Comparison) -> Facts:
    """Return the figures that go into the facts."""
    names = ("probes", "positions", "mean_kl", "worst_kl", "top1")
    facts = {name: getattr(comparison, name) for name in names}
    return facts | (asdict(comparison.labels) if comparison.labels else {})


def check_texts(chosen: Probes, prompting: Prompting, tokenize: probes.Tokenize) -> list[str]:
    """Return what differs first when the prompts are rendered as the output says, or nothing."""
    for probe in chosen.probes:
        text = prompting.prompt(probe.messages)
        if text != probe.prompt.text:
            place = _first_difference(probe.prompt.tokens, tokenize([text])[0])
            cause = _difference(probe.prompt.text, text, prompting.bos_token)
            return [f"{probe.origin} {cause} (first at token {place}); see its prompting.json"]
    return []


def _difference(trained: str, rendered: str, bos: str) -> str:
    if bos and rendered == bos + trained:
        return f"now begins with {bos} twice: a doubled BOS"
    if bos and trained == bos + rendered:
        return f"no longer begins with {bos}: a dropped BOS"
    first = _first_difference(trained, rendered)
    was, now = trained[first : first + 20], rendered[first : first + 20]
    return f"is rendered as {now!r} where training had {was!r}: another chat template"


def check_tokens(chosen: Probes, tokenize: probes.Tokenize) -> list[str]:
    """Return the first prompt or answer whose token ids differ, or nothing."""
    texts = [text for probe in chosen.probes for text in (probe.prompt, probe.answer)]
    owners = [probe for probe in chosen.probes for _ in range(2)]
    for probe, text, ids in zip(owners, texts, tokenize([text.text for text in texts]), strict=True):
        if tuple(ids) != text.tokens:
            place = _first_difference(text.tokens, ids)
            now, was = (list(found)[place : place + 1] for found in (ids, text.tokens))
            return [f"{probe.origin}: token {place} is {now} and was {was} in training: another tokenizer"]
    return []


def _first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    pairs = enumerate(zip_longest(one, other))
    return next((place for place, (a, b) in pairs if a != b), 0)


def judge(comparison: Comparison, limits: Limits, prefix: str = "") -> list[str]:
    """Return which limits are passed, each as ``figure is over limit``.

    ``prefix`` is what the keys that set them begin with.
    """
    found = []
    if not comparison.mean_kl <= limits.max_mean_kl:
        found.append(f"mean KL {comparison.mean_kl:.3g} is over {prefix}max_mean_kl={limits.max_mean_kl:g}")
    if not comparison.worst_kl <= limits.max_worst_kl:
        found.append(
            f"worst KL {comparison.worst_kl:.3g} is over {prefix}max_worst_kl={limits.max_worst_kl:g}"
        )
    if comparison.top1 < limits.min_top1:
        found.append(f"top-1 agreement {comparison.top1:.3f} is under {prefix}min_top1={limits.min_top1:g}")
    return found + (_judge_labels(comparison, comparison.labels, limits, prefix) if comparison.labels else [])


def _judge_labels(comparison: Comparison, labels: Labels, limits: Limits, prefix: str) -> list[str]:
    found = []
    if labels.flips > limits.max_label_flips * comparison.probes:
        found.append(
            f"{labels.flips} of {comparison.probes} labels flip, over "
            f"{prefix}max_label_flips={limits.max_label_flips:g}"
        )
    if labels.lost > labels.gained and labels.p_value < limits.min_p_value:
        found.append(
            f"{labels.lost} right answers are lost and {labels.gained} gained, p={labels.p_value:.2g} by "
            f"McNemar's test, under {prefix}min_p_value={limits.min_p_value:g}"
        )
    return found


def place_and_causes(step: str, chosen: Probes, comparison: Comparison) -> str:
    """Return where the model differs first, and what that likely comes from."""
    place = comparison.first or comparison.worst
    probe = chosen.probes[place.probe]
    return (
        f"first at {probe.origin}, token {place.position} ({_context(probe, place.position)}): "
        f"expected {place.expected}, found {place.found}; likely {CAUSES[step]}"
    )


def _context(probe: Probe, position: int) -> str:
    """Say which part of the probe a token's place is in."""
    after = position - len(probe.prompt.tokens)
    return f"{after} of the answer {probe.answer.text[:40]!r}" if after >= 0 else "of the prompt"


def say_table(proof: Proof, comparison: Comparison, progress: Progress) -> None:
    """Show the figures beside their limits, a line each."""
    limits, labels = proof.limits, comparison.labels
    rows = [
        ("mean KL", f"{comparison.mean_kl:.3g}", f"<= {limits.max_mean_kl:g}"),
        ("worst KL", f"{comparison.worst_kl:.3g}", f"<= {limits.max_worst_kl:g}"),
        ("top-1 agreement", f"{comparison.top1:.4f}", f">= {limits.min_top1:g}"),
    ]
    if labels:
        flips = f"{labels.flips} of {comparison.probes}"
        rows.append(("label flips", flips, f"<= {limits.max_label_flips * comparison.probes:g}"))
        rows.append(("lost, gained, p", f"{labels.lost}, {labels.gained}, {labels.p_value:.2g}", ""))
    progress.say(f"{proof.step}: parity with its input on {comparison.probes} prompts")
    for name, value, limit in rows:
        progress.say(f"  {name:<16} {value:>12}  {limit}".rstrip())

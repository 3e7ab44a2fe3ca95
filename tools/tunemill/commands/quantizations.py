"""What differs between two GGUF artifacts beyond their records: tensors, and the labels they choose.

Two classes of host, two compilers or an importance matrix leave other bytes in some tensors; whether that
matters, the answers to the probe set say, which both artifacts carry with them.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunemill.gguf.differences import Compared, compare_models
from tunemill.ggufs import find_gguf
from tunemill.host import this_host
from tunemill.progress import Progress
from tunemill.store import Artifact, Store

if TYPE_CHECKING:
    from tunemill.gguf.library import Library


def compare(store: Store, first: Artifact, second: Artifact, progress: Progress) -> dict[str, Any] | None:
    """Pull two GGUF artifacts and return ``{"tensors", "parity"}``; None where they are no two GGUFs.

    Raises:
        BadDataError: a file is damaged.
    """
    if {first.kind, second.kind} != {"gguf"} or first.content == second.content:
        return None
    with tempfile.TemporaryDirectory(prefix="tunemill-") as scratch:
        folders = [Path(scratch, side) for side in ("first", "second")]
        for artifact, folder in zip((first, second), folders, strict=True):
            store.pull(artifact, folder, progress)
        found = compare_models(find_gguf(folders[0]), find_gguf(folders[1]), _library(Path(scratch)))
        return {"tensors": _tensors(found), "parity": _parity(*folders)}


def lines(compared: dict[str, Any]) -> Iterator[str]:
    """Yield what ``compare`` found as text."""
    tensors, parity = compared["tensors"], compared["parity"]
    worst = tensors["worst"]
    most = f", most in {worst['name']}: {worst['largest']:.3g}" if worst else ""
    yield f"tensors: {len(tensors['differing'])} of {tensors['count']} differ{most}"
    for each in tensors["differing"]:
        kind = each["first"] if each["first"] == each["second"] else f"{each['first']} -> {each['second']}"
        apart = "" if each["largest"] is None else f", at most {each['largest']:.3g} apart"
        yield f"  tensor {each['name']}: {kind}{apart}"
    if isinstance(parity, str):
        yield f"labels: not compared, {parity}"
        return
    labels = parity["labels"]
    flips = f"{labels['flips']} of {parity['probes']} labels flip" if labels else "the task has no labels"
    yield (
        f"labels: {flips}; mean KL {parity['mean_kl']:.3g}, worst {parity['worst_kl']:.3g}, "
        f"top-1 agreement {parity['top1']:.4f} over {parity['positions']} positions"
    )


def _library(scratch: Path) -> Library | None:
    """Return what dequantizes, where llama.cpp and NumPy are installed."""
    if this_host().llama_cpp is None or find_spec("numpy") is None:
        return None
    from tunemill.gguf.library import Library

    return Library(scratch, threading.Event())


def _tensors(found: Compared) -> dict[str, Any]:
    return {
        "count": found.tensors,
        "differing": [vars(each) for each in found.differing],
        "worst": vars(found.worst) if found.worst else None,
    }


def _parity(first: Path, second: Path) -> dict[str, Any] | str:
    """Return the comparison of both artifacts' answers, or why there is none."""
    if find_spec("numpy") is None:
        return "this needs the Python package 'numpy'"
    from tunemill.parity import distributions, probes
    from tunemill.parity.compare import compare as compare_answers

    needed = [side / name for side in (first, second) for name in (probes.FILE, distributions.FILE)]
    if not all(path.exists() for path in needed):
        return "not both have a probe set"
    chosen, others = probes.Probes.load(first), probes.Probes.load(second)
    if chosen.digest != others.digest:
        return "they have different probe sets"
    answers = [distributions.Distributions.load(side) for side in (first, second)]
    return compare_answers(chosen, *answers).as_json()

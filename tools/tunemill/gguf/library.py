"""The one door to llama.cpp: requests to a child process that loads it.

The parent never loads the library, so an ``abort`` in it becomes an error line, not a lost stage.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunemill.files import write_json
from tunemill.gguf.child import Limits, fail, machine_memory, read_end, read_result, run
from tunemill.parity.distributions import Distributions
from tunemill.parity.probes import Probes

COUNTED = re.compile(r"^\[ *(\d+)/ *\d+\]", re.MULTILINE)
"""How the log counts what is done, tensors or probes."""
TEMPLATE_SECONDS = 120.0
SECONDS = 24 * 3600.0  # a 70B model is quantized in a few hours on a slow machine


@dataclass(frozen=True)
class Answer:
    """What came back from the child."""

    value: Any
    llama: dict[str, str]
    """Version, ``ggml_version``, ``ggml_commit`` and ``system_info`` of the library."""
    log: str


@dataclass(frozen=True)
class Library:
    """llama.cpp, one child process per request."""

    scratch: Path
    stop: threading.Event

    def quantize(
        self,
        source: Path,
        target: Path,
        settings: dict[str, Any],
        tick: Callable[[], None],
        tensor_types: Sequence[tuple[str, int]] = (),
        imatrix: Path | None = None,
    ) -> Answer:
        """Quantize ``source`` to ``target``; ``settings`` are ``llama_model_quantize_params``.

        ``tensor_types`` are regular expressions of tensor names with types; the first match counts.

        Raises:
            BadDataError: llama.cpp cannot; the message ends with its reason.
        """
        request: dict[str, Any] = {
            "task": "quantize",
            "source": str(source),
            "target": str(target),
            "settings": settings,
        }
        request |= {"tensor_types": list(tensor_types), "imatrix": str(imatrix) if imatrix else None}
        return self._ask(request, f"quantizing {source.name}", tick)

    def tokenize(self, model: Path, texts: Sequence[str]) -> Answer:
        """Return ``{"ids": one list per text, "size": of the vocabulary, "bos": id}``.

        Raises:
            BadDataError: llama.cpp cannot read the vocabulary.
        """
        return self._ask({"task": "tokenize", "model": str(model), "texts": list(texts)}, model.name)

    def load(self, model: Path) -> Answer:
        """Load a model once with all its tensors; return ``{"parameters", "bytes"}``.

        Raises:
            BadDataError: llama.cpp cannot load it, or a tensor holds invalid numbers.
        """
        return self._ask({"task": "load", "model": str(model)}, f"loading {model.name}")

    def measure(self, model: Path, probes: Probes, tick: Callable[[], None] = lambda: None) -> Distributions:
        """Return a model's answers to the probe set, computed on the CPU; ``tick`` is called after each.

        Raises:
            BadDataError: llama.cpp cannot load it, or it computes no numbers.
        """
        directory = self.scratch / "parity"
        directory.mkdir(parents=True, exist_ok=True)
        probes.save(directory)
        told = 0

        def count() -> None:
            nonlocal told
            done = COUNTED.findall(read_end(self.log))
            for _ in range(told, int(done[-1]) if done else 0):
                told += 1
                tick()

        request = {"task": "measure", "model": str(model), "probes": str(directory), "target": str(directory)}
        self._ask(request, f"computing with {model.name}", count)
        found = Distributions.load(directory)
        shutil.rmtree(directory)
        return found

    def imatrix(
        self,
        model: Path,
        texts: Sequence[Sequence[str]],
        target: Path,
        settings: dict[str, Any],
        gpu_layers: int,
        tick: Callable[[], None],
    ) -> Answer:
        """Write a model's importance matrix over texts, given in parts; return their ``{"tokens"}``.

        ``settings`` are ``activations.Settings``. What a stopped run has done is kept beside ``target``.

        Raises:
            BadDataError: llama.cpp cannot compute them, or meets numbers that are none.
        """
        request: dict[str, Any] = {
            "task": "imatrix",
            "model": str(model),
            "texts": [list(parts) for parts in texts],
        }
        request |= {"target": str(target), "settings": settings, "gpu_layers": gpu_layers}
        return self._ask(request, f"reading texts with {model.name}", tick)

    def chat(self, model: Path, conversations: Sequence[Sequence[Mapping[str, str]]]) -> Answer:
        """Return what others make of conversations by the file's own template; see ``gguf.chat``.

        Raises:
            BadDataError: llama.cpp cannot read the vocabulary.
            TransientError: the template takes longer than ``TEMPLATE_SECONDS``.
        """
        request = {"task": "chat", "model": str(model), "conversations": [list(c) for c in conversations]}
        return self._ask(request, f"the chat template of {model.name}", seconds=TEMPLATE_SECONDS)

    def differences(self, pairs: Sequence[Sequence[dict[str, Any]]]) -> Answer:
        """Return the largest difference of each pair of tensors, as ``dequantize.differences`` takes them.

        Raises:
            BadDataError: a file cannot be read.
        """
        return self._ask({"task": "differences", "pairs": pairs}, "comparing tensors")

    def speed(self, model: Path) -> Answer:
        """Return ``{"prompt", "written"}``: tokens a second that a model reads and writes on this machine.

        Raises:
            BadDataError: llama.cpp cannot load or compute it.
        """
        return self._ask({"task": "speed", "model": str(model)}, f"timing {model.name}")

    @property
    def log(self) -> Path:
        """Where the running child writes."""
        return self.scratch / "llama" / "log"

    def _ask(
        self,
        request: dict[str, Any],
        subject: str,
        tick: Callable[[], None] = lambda: None,
        seconds: float = SECONDS,
    ) -> Answer:
        directory = self.scratch / "llama"
        file = directory / "request.json"
        answer_file = file.with_suffix(".answer.json")
        answer_file.unlink(missing_ok=True)
        write_json(file, request)
        limits = Limits(seconds, machine_memory())
        ended = run(["tunemill.gguf.worker", str(file)], directory, limits, self.stop, tick)
        fail(ended, subject, limits)
        answer = read_result(answer_file)
        return Answer(answer["answer"], answer["llama"], ended.log)

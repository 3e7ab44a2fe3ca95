"""Times a model; runs inside the child process.

Reading a prompt and writing an answer are bounded by different things, computing and memory, and so are
two figures. The first pass only warms up: it reads the weights from disk and compiles a GPU's kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PROMPT = 128  # tokens; more change the rate little
WRITTEN = 48
SECONDS = 5.0  # after which a slow model has shown what it does


def tokens_per_second(llama_cpp: Any, model: Any, threads: int) -> dict[str, float]:
    """Return ``{"prompt", "written"}``, tokens a second of each."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = PROMPT + WRITTEN
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise SystemExit("error: llama.cpp has no memory to time the model")
    memory = llama_cpp.llama_get_memory(context)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    tokens = [number * 7919 % vocabulary for number in range(PROMPT + WRITTEN)]

    def decode(first: int, count: int) -> None:
        batch = (llama_cpp.llama_token * count)(*tokens[first : first + count])
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(batch, count)):
            raise SystemExit("error: llama.cpp could not compute a batch to time it")
        llama_cpp.llama_synchronize(context)

    decode(0, 1)
    llama_cpp.llama_memory_clear(memory, True)
    read = _rate(lambda _: decode(0, PROMPT), 1) * PROMPT
    return {"prompt": read, "written": _rate(lambda place: decode(PROMPT + place, 1), WRITTEN)}


def _rate(act: Callable[[int], None], most: int) -> float:
    """Return how often a second ``act`` can be done, by up to ``most`` times within ``SECONDS``."""
    started, done = time.monotonic(), 0
    while done < most and (done == 0 or time.monotonic() - started < SECONDS):
        act(done)
        done += 1
    return done / (time.monotonic() - started)

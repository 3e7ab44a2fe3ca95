"""The ways to classify texts that the benchmark of inference compares, each in a process of its own.

``python tests/bench/peers.py METHOD CASE`` answers the rows of a case (a JSON file, written by
``bench_infer.py``) and prints what it took as JSON. Seconds are those of answering alone, without
imports and without loading the model, for ours as for the others; ``whole`` holds what ours takes with
everything around it. All get the same token ids, except ours, which renders and tokenizes the rows itself.
"""

from __future__ import annotations

import http.client
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SLOTS = 8  # texts at once in llama.cpp's server; more gained nothing on two cores
BATCH = 16  # texts at once in transformers
START_SECONDS = 120


def loop(case: dict[str, Any], cache: bool = False) -> dict[str, Any]:
    """The published studies': one call for each text, the answer parsed out of what it writes."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(case["gguf"]), n_ctx=case["context"], n_threads=case["threads"],
        n_threads_batch=case["threads"], verbose=False,
    )  # fmt: skip
    if cache:
        model.set_cache(llama_cpp.LlamaRAMCache())
    begun = time.monotonic()
    texts = []
    for row in case["rows"]:
        said = model(row, max_tokens=case["max_tokens"], temperature=0)
        texts.append(said["choices"][0]["text"])
    return _result(case, texts, time.monotonic() - begun)


def cached_loop(case: dict[str, Any]) -> dict[str, Any]:
    """The same with llama-cpp-python's cache of prefixes."""
    return loop(case, cache=True)


def server(case: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp's own server, with as many clients as it has slots."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [case["server"], "--model", case["gguf"], "--port", port, "--parallel", SLOTS]
    words += ["--ctx-size", SLOTS * case["context"], "--threads", case["threads"], "--log-disable"]
    running = subprocess.Popen([str(word) for word in words], stderr=subprocess.DEVNULL)
    try:
        _wait_for(port)
        return _asked(case, port, running.pid)
    finally:
        running.terminate()
        running.wait()


def xllamacpp(case: dict[str, Any]) -> dict[str, Any]:
    """The same server inside of Python, from the package xllamacpp, which brings a llama.cpp of its own."""
    import xllamacpp as package

    params = package.CommonParams()
    params.model.path = str(case["gguf"])
    params.n_parallel, params.n_ctx = SLOTS, SLOTS * case["context"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = case["threads"]
    params.verbosity = 0
    params.port = 0
    running = package.Server(params)
    return _asked(case, int(running.listening_address.rpartition(":")[2]), os.getpid())


def _wait_for(port: int) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        try:
            if _ask(http.client.HTTPConnection("127.0.0.1", port), "GET", "/health", None)[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.05)
    sys.exit("llama-server did not start")


def _ask(connection: http.client.HTTPConnection, verb: str, path: str, body: Any) -> tuple[int, Any]:
    connection.request(verb, path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def _asked(case: dict[str, Any], port: int, process: int) -> dict[str, Any]:
    def client(number: int) -> Iterator[tuple[int, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for place in range(number, len(case["rows"]), SLOTS):
            wanted = {"prompt": case["rows"][place], "n_predict": case["max_tokens"], "temperature": 0}
            status, said = _ask(connection, "POST", "/completion", {**wanted, "cache_prompt": True})
            if status != 200:
                sys.exit(f"the server refused: {said}")
            yield place, said["content"]

    begun = time.monotonic()
    with ThreadPoolExecutor(SLOTS) as clients:
        found = dict(pair for pairs in clients.map(lambda n: list(client(n)), range(SLOTS)) for pair in pairs)
    seconds = time.monotonic() - begun
    texts = [found[place] for place in range(len(case["rows"]))]
    return {**_result(case, texts, seconds), "peak_mb": _peak(process)}


def transformers(case: dict[str, Any]) -> dict[str, Any]:
    """Batches of similar length, generated greedily in 32-bit floats, which a CPU computes fastest."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(case["threads"])
    model = AutoModelForCausalLM.from_pretrained(case["folder"], dtype=torch.float32).eval()
    order = sorted(range(len(case["rows"])), key=lambda place: len(case["rows"][place]))
    texts: list[tuple[int, ...]] = [()] * len(order)
    begun = time.monotonic()
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        rows = [case["rows"][place] for place in places]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        with torch.inference_mode():
            made = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False,
                max_new_tokens=case["max_tokens"], pad_token_id=0, eos_token_id=2,
            )  # fmt: skip
        for place, tokens in zip(places, made[:, longest:].tolist(), strict=True):
            texts[place] = tuple(tokens)
    seconds = time.monotonic() - begun
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(case["folder"])
    return _result(case, [tokenizer.decode(one, skip_special_tokens=True) for one in texts], seconds)


def ours(case: dict[str, Any]) -> dict[str, Any]:
    """The infer stage's work, files and all."""
    import threading

    import pyarrow.parquet

    from tunemill.files import sha256_file
    from tunemill.infer.config import InferConfig
    from tunemill.infer.predict import predict
    from tunemill.progress import Progress, Task
    from tunemill.work import Input, Work

    class Stopwatch(Progress):
        """Notes how long the answering took, from when the host is known to be the model's."""

        seconds = 0.0

        @contextmanager
        def task(self, name: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
            with super().task(name, total, unit) as task:
                advance, begun = task.advance, []

                def noted(amount: float = 1, note: str | None = None) -> None:
                    begun.append(time.monotonic())
                    advance(amount, note)

                task.advance = noted
                yield task
            if name == "infer":
                self.seconds = time.monotonic() - begun[0]

    pyarrow.array([0])  # imports pandas, where it is installed: imports are in no method's seconds

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for name in ("out", "scratch"):
            (root / name).mkdir()
        paths = {"gguf": Path(case["gguf"]).parent, "data": Path(case["data"])}
        inputs = {role: Input(f"b/{role}@sha256:0", "0", role, path, {}) for role, path in paths.items()}
        config = InferConfig(**{"n_threads": case["threads"], "limit": len(case["rows"]), **case["settings"]})
        watch = Stopwatch(quiet=True)
        nothing: Any = None
        begun = time.monotonic()
        predict(Work(config, inputs, root / "out", root / "scratch", watch, nothing, threading.Event()))
        whole = time.monotonic() - begun
        predictions = root / "out/predictions.parquet"
        answers, digest = pyarrow.parquet.read_table(predictions), sha256_file(predictions)
    return {**_result(case, answers["label"].to_pylist(), watch.seconds), "whole": whole, "sha256": digest}


def _result(case: dict[str, Any], texts: list[str], seconds: float) -> dict[str, Any]:
    labels = [_parsed(text or "", case["labels"]) for text in texts]
    return {"seconds": seconds, "labels": labels, "peak_mb": _peak(os.getpid())}


def _parsed(text: str, labels: list[str]) -> str | None:
    """The label that was written, if nothing but a label was."""
    return text.strip() if text.strip() in labels else None


def _peak(process: int) -> float:
    """Most megabytes that a process had resident."""
    status = Path(f"/proc/{process}/status")
    if status.exists():
        line = next(one for one in status.read_text().splitlines() if one.startswith("VmHWM"))
        return int(line.split()[1]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on a Mac


METHODS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "loop": loop,
    "loop, cache": cached_loop,
    "llama-server": server,
    "xllamacpp": xllamacpp,
    "transformers": transformers,
    "tunemill": ours,
}

if __name__ == "__main__":
    method, path = sys.argv[1:]
    print(json.dumps(METHODS[method](json.loads(Path(path).read_text()))))

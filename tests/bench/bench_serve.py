"""llama.cpp's own server beside llama-cpp-python's, on the same model: one client, then eight.

    python tests/bench/bench_serve.py MODEL.gguf [--requests 40] [--rounds 3] [--threads N]

Every client asks for chat completions at temperature 0, one after the other, about texts of their own; the
seconds are those of the requests. The servers take turns and the best round counts. llama-cpp-python's server
needs its packages (``pip install 'llama-cpp-python[server]'``); where they are missing that is said.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from statistics import median
from typing import Any

from tunemill.gguf.server import find_server

CLIENTS = (1, 8)
SLOTS = 8
CONTEXT = 1024
ANSWER = 16  # tokens
START_SECONDS = 120
NEEDED = ("uvicorn", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings")


def commands(chosen: argparse.Namespace, port: int) -> Iterator[tuple[str, list[str]]]:
    """Yield each server's name and how to start it."""
    common = ["--model", chosen.model, "--port", str(port)]
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        print(f"llama-cpp-python's server: not installed ({missing[0]} is missing)")
    else:
        words = [*common, "--n_ctx", str(CONTEXT), "--n_threads", str(chosen.threads)]
        words += ["--n_threads_batch", str(chosen.threads), "--verbose", "false"]
        yield "llama-cpp-python", [sys.executable, "-m", "llama_cpp.server", *words]
    words = [*common, "--parallel", str(SLOTS), "--ctx-size", str(SLOTS * CONTEXT)]
    yield "llama-server", [str(find_server()), *words, "--threads", str(chosen.threads), "--log-disable"]


@contextmanager
def running(command: list[str], port: int) -> Iterator[None]:
    """Run a server within the block, from when it answers."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + START_SECONDS
        while not answers(port):
            if process.poll() is not None or time.monotonic() > until:
                sys.exit(f"{command[0]} did not start")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait()


def answers(port: int) -> bool:
    """Say whether a server lists its models."""
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/v1/models")
        return connection.getresponse().status == 200
    except OSError:
        return False


def client(port: int, number: int, requests: int) -> list[float]:
    """Ask one question after the other; return the seconds of each."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    taken = []
    for request in range(requests):
        text = f"Text {number}.{request}: what a parliament said of budgets, taxes and of work, "
        wanted: dict[str, Any] = {"messages": [{"role": "user", "content": text * 4}]}
        wanted |= {"temperature": 0, "max_tokens": ANSWER}
        begun = time.monotonic()
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(wanted), headers)
        answer = connection.getresponse()
        said = json.loads(answer.read())
        if answer.status != 200:
            sys.exit(f"the server refused: {said}")
        taken.append(time.monotonic() - begun)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args()
    best: dict[tuple[str, int], tuple[float, float]] = {}
    for _ in range(chosen.rounds):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for name, command in commands(chosen, port):
            with running(command, port):
                client(port, 99, 1)  # the first request warms the server up
                for count in CLIENTS:
                    found = rate_and_median(port, count, chosen.requests // count)
                    best[name, count] = max(found, best.get((name, count), found))
    print("| server | clients | requests/s | median ms |\n|---|---:|---:|---:|")
    for (name, count), (rate, middle) in best.items():
        print(f"| {name} | {count} | {rate:.3g} | {middle * 1e3:.0f} |")


def rate_and_median(port: int, count: int, each: int) -> tuple[float, float]:
    """Let clients ask at once; return requests in a second and the middle one's seconds."""
    begun = time.monotonic()
    with ThreadPoolExecutor(count) as pool:
        taken = list(pool.map(client, [port] * count, range(count), [each] * count))
    return each * count / (time.monotonic() - begun), median(one for found in taken for one in found)


if __name__ == "__main__":
    main()

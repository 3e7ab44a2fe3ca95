"""Runs llama.cpp's server over one GGUF, and sees that it asks the model as training did.

The server is a child process that dies with this one. It gets the chat template of ``prompting.json``; before
anyone is told its address, it renders conversations that the model was asked in training, or a greeting, and
its token ids have to be training's.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from tunemill.errors import ConfigurationError, UsageError
from tunemill.parity import probes
from tunemill.prompting import Message, Prompting

START_SECONDS = 900  # a 70B model from a slow network disk
STOP_SECONDS = 10
POLL_SECONDS = 0.05
ASKED = 3  # conversations of the probe set that are compared
GREETING = ({"role": "user", "content": "Good morning."},)
SETTINGS = "LLAMA_ARG_"
"""Begins the environment variables that would change the server's settings behind our back."""
LAUNCH = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""

log = logging.getLogger("tunemill")


@dataclass(frozen=True)
class Address:
    """Where the server listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """Base of OpenAI-compatible requests."""
        return f"{self.root}/v1"

    @property
    def root(self) -> str:
        """Base of llama.cpp's own requests, as this machine reaches them."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


@dataclass(frozen=True)
class Settings:
    """How one model is served; the names are llama-server's."""

    model: Path
    alias: str
    """What the API calls the model."""
    address: Address
    parallel: int
    """Requests answered at once."""
    ctx_size: int
    """Tokens remembered; each of ``parallel`` requests has an equal share, so none takes another's."""
    threads: int
    """0 for llama.cpp's own choice."""
    gpu_layers: int
    """-1 for all."""

    def words(self) -> list[str]:
        """Return the server's arguments."""
        named = {
            "--model": self.model,
            "--alias": self.alias,
            "--host": self.address.host,
            "--port": self.address.port,
            "--parallel": self.parallel,
            "--ctx-size": self.ctx_size,
            "--n-gpu-layers": "all" if self.gpu_layers < 0 else self.gpu_layers,
            "--reasoning-format": "none",
            "--log-verbosity": 2,
            "--cors-origins": "http://localhost",  # no web page of elsewhere asks through a browser here
        }
        if self.threads:
            named["--threads"] = self.threads
        words = [str(word) for pair in named.items() for word in pair]
        return [*words, "--no-kv-unified", "--offline", "--no-slots"]


def choose_address(host: str, port: int, protected: bool) -> Address:
    """Return where to listen; port 0 takes a free one.

    Raises:
        UsageError: there is no such address, or others could reach it and there is no API key.
        ConfigurationError: the port is in use, or needs rights.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UsageError(f"--host {host}: {error.strerror}; 127.0.0.1 is this machine alone") from error
    if not protected and not ip_address(str(place[0]).partition("%")[0]).is_loopback:
        raise UsageError(
            f"--host {host} is reached by other machines: give an API key (--api-key-file FILE, or "
            "TUNEMILL_API_KEY), or listen on 127.0.0.1"
        )
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(place)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ConfigurationError(
                f"port {port} of {host}: {reason}; choose another with --port"
            ) from error
        return Address(host, int(probe.getsockname()[1]))


@contextmanager
def running(server: Path, settings: Settings, prompting: Prompting, key: str | None) -> Iterator[Server]:
    """Run the server within the block, from when it answers.

    Raises:
        ConfigurationError: it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="tunemill-") as temporary:
        template = Path(temporary, "chat_template.jinja")
        template.write_text(prompting.chat_template, "utf-8")
        words = [str(server), *settings.words(), "--chat-template-file", str(template)]
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", LAUNCH, str(os.getpid()), *words],
            env=_environment(key),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        found = Server(process, settings.address, key)
        try:
            found.wait_until_ready()
            yield found
        finally:
            found.stop()


def _environment(key: str | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    kept.pop("LLAMA_API_KEY", None)
    return kept | ({"LLAMA_API_KEY": key} if key else {})


class Server:
    """A running llama-server."""

    def __init__(self, process: subprocess.Popen[bytes], address: Address, key: str | None) -> None:
        self.address = address
        self._process = process
        self._key = key
        self._said: deque[str] = deque(maxlen=20)
        self._listener = threading.Thread(target=self._listen, name="llama-server", daemon=True)
        self._listener.start()

    def wait_until_ready(self) -> None:
        """Return when the model is loaded.

        Raises:
            ConfigurationError: the server ended, or takes too long.
        """
        until = time.monotonic() + START_SECONDS
        while not self._healthy():
            if self._process.poll() is not None:
                raise ConfigurationError(f"llama-server does not start: {self._reason()}")
            if time.monotonic() > until:
                raise ConfigurationError(f"llama-server was not ready after {START_SECONDS} s")
            time.sleep(POLL_SECONDS)

    def wait(self) -> None:
        """Wait for the end of the server, which nobody asked for.

        Raises:
            ConfigurationError: always, when it has ended.
        """
        status = self._process.wait()
        raise ConfigurationError(f"llama-server ended with status {status}: {self._reason()}")

    def stop(self) -> None:
        """End the server; safe to call twice."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._listener.join(STOP_SECONDS)

    def tokens(self, text: str, whole: bool) -> list[int]:
        """Return a text's token ids; of a ``whole`` prompt with what the server adds to it."""
        wanted = {"content": text, "add_special": whole, "parse_special": True}
        return list(map(int, self._ask("/tokenize", wanted)["tokens"]))

    def rendered(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids that the model is asked with."""
        said = self._ask("/apply-template", {"messages": [dict(message) for message in messages]})
        return self.tokens(str(said["prompt"]), whole=True)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address.root}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _ask(self, path: str, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.address.root + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise ConfigurationError(
                f"llama-server refuses {path}: {error.read(300).decode(errors='replace')}"
            ) from error

    def _listen(self) -> None:
        for line in self._process.stdout or ():
            text = line.decode(errors="replace").strip()
            log.debug("%s", text)
            if text:
                self._said.append(text)

    def _reason(self) -> str:
        self._listener.join(STOP_SECONDS)
        lines = list(self._said)
        errors = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
        return ((errors or lines)[:1] or ["it said nothing"])[0][:300]


def check_rendering(server: Server, folder: Path, prompting: Prompting) -> int:
    """See that the server asks with training's token ids; return how many conversations were compared.

    Raises:
        ConfigurationError: it asks with others.
    """
    asked: list[tuple[Sequence[Message], list[int]]]
    if (folder / probes.FILE).exists():
        chosen = probes.Probes.load(folder).probes[:ASKED]
        asked = [(probe.messages, list(probe.prompt.tokens)) for probe in chosen]
    else:
        asked = [(GREETING, server.tokens(prompting.prompt(GREETING), whole=False))]
    for messages, tokens in asked:
        if server.rendered(messages) != tokens:
            raise ConfigurationError(
                "llama-server, which has a template engine of its own, renders conversations otherwise than "
                "training did: use 'tunemill infer' instead"
            )
    return len(asked)

"""``tunemill serve``: a real llama-server over a micro model, asked as OpenAI's clients ask it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from backends import provenance
from counting import TEMPLATE, save_data, save_model, save_probes
from tunemill.errors import UsageError
from tunemill.gguf import server as llama_server
from tunemill.progress import Progress
from tunemill.prompting import Prompting
from tunemill.serving import Address, choose_address
from tunemill.store import Draft, Store, create_store, open_store

CommandLine = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.timeout(300)  # a server that should have been refused would run for ever
LAB, KEY = "lab/gguf-f16", "a-key-of-the-lab"
QUIET = Progress(quiet=True)
SECONDS = 120


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store with the counting model; where no server is compiled here yet, it is now."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler for llama.cpp's server")
    llama_server.install()
    folder = tmp_path_factory.mktemp("lab")
    save_model(folder / "model")
    save_data(folder / "data")
    save_probes(folder / "model", folder / "data", folder / "scratch")
    store, _ = create_store(str(folder / "store"))
    publish(store, folder / "model", LAB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEMILL_STORE", str(folder / "store"))
        patch.setenv("TUNEMILL_CACHE", str(folder / "cache"))
        patch.delenv("TUNEMILL_API_KEY", raising=False)
        yield folder


def publish(store: Store, folder: Path, name: str, **changes: Any) -> str:
    draft = Draft(name=name, kind="gguf", directory=folder, facts={}, provenance=provenance(**changes))
    return store.publish(draft, QUIET).reference


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen[str]
    url: str

    def ask(self, path: str, body: Any = None, key: str | None = KEY) -> tuple[int, Any]:
        """Return status and JSON of one request."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def chat(self, text: str, **settings: Any) -> str:
        body = {
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": 3,
            **settings,
        }
        status, said = self.ask("/chat/completions", body)
        assert status == 200, said
        return str(said["choices"][0]["message"]["content"])

    def child(self) -> psutil.Process:
        return psutil.Process(self.process.pid).children()[0]


def start(*words: str, **environment: str) -> Running:
    command = [sys.executable, "-m", "tunemill.cli", "serve", *words, "--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:"), process.communicate()[1]
    return Running(process, url)


@pytest.fixture(scope="module")
def running(lab: Path) -> Iterator[Running]:
    """The lab's model behind a key, with environment variables that must not matter."""
    file = lab / "key"
    file.write_text(f"{KEY}\n")
    found = start(LAB, "--api-key-file", str(file), LLAMA_ARG_PORT="1", LLAMA_API_KEY="another")
    yield found
    found.process.kill()
    found.process.communicate()


def test_what_it_answers_is_the_models_and_the_same_each_time(running: Running) -> None:
    assert [running.chat("abc") for _ in range(3)] == ["def"] * 3
    assert running.chat("tuv") == "wxy"


def test_an_answer_stops_before_what_it_is_told_to_stop_at(running: Running) -> None:
    assert running.chat("abc", max_tokens=8, stop=["f"]) == "de"


def test_several_clients_at_once_get_what_one_gets(running: Running) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(running.chat, ["abc", "tuv"] * 8)) == ["def", "wxy"] * 8


def test_long_requests_wait_for_each_other_and_too_long_ones_are_told_so(running: Running) -> None:
    from concurrent.futures import ThreadPoolExecutor

    long = "abcdefghij" * 5  # letters are tokens, of which the model was trained for 64
    with ThreadPoolExecutor(8) as clients:
        assert (
            list(clients.map(lambda text: running.chat(text, max_tokens=8), [f"{long}klm"] * 80))
            == ["nopqrstu"] * 80
        )
    body = {"messages": [{"role": "user", "content": long * 2}], "max_tokens": 3}
    status, said = running.ask("/chat/completions", body)
    assert (status, said["error"]["n_ctx"]) == (400, 64)


def test_the_model_is_listed_by_its_name(running: Running) -> None:
    status, said = running.ask("/models")
    assert (status, [model["id"] for model in said["data"]]) == (200, [LAB])


@pytest.mark.parametrize("key", [None, "wrong", "another"])
def test_without_the_key_nothing_is_answered(running: Running, key: str | None) -> None:
    body = {"messages": [{"role": "user", "content": "abc"}]}
    assert running.ask("/chat/completions", body, key)[0] == 401


def test_the_key_is_in_no_list_of_processes(running: Running) -> None:
    assert KEY not in " ".join([*running.child().cmdline(), *running.process.args])  # type: ignore[list-item]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_and_its_child(lab: Path, number: signal.Signals, code: int) -> None:
    found = start(LAB)
    child = found.child()
    found.process.send_signal(number)
    _, stderr = found.process.communicate(timeout=SECONDS)
    assert found.process.returncode == code
    assert stderr.splitlines()[-1].startswith("tunemill: ")
    assert "Traceback" not in stderr
    assert not child.is_running()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_killed_it_takes_its_child_along(lab: Path) -> None:
    found = start(LAB)
    child = found.child()
    found.process.kill()
    found.process.communicate()
    assert child.wait(SECONDS) is None or not child.is_running()


def test_when_the_server_dies_it_says_so(lab: Path) -> None:
    found = start(LAB)
    found.child().kill()
    _, stderr = found.process.communicate(timeout=SECONDS)
    assert found.process.returncode == 78
    assert "llama-server ended with status -9" in stderr.splitlines()[-1]


def test_a_dry_run_pulls_nothing(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: CommandLine
) -> None:
    monkeypatch.setenv("TUNEMILL_CACHE", str(tmp_path / "cache"))
    code, stdout, _ = command_line("serve", LAB, "--port", "0", "--dry-run")
    assert code == 0
    assert stdout.startswith(f"would serve {LAB}@sha256:")
    assert not (tmp_path / "cache/served").exists()


def test_a_port_in_use_is_refused(lab: Path, command_line: CommandLine) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, stdout, stderr = command_line("serve", LAB, "--port", str(port))
    assert (code, stdout) == (78, "")
    assert stderr == (
        f"tunemill: port {port} of 127.0.0.1: address already in use; choose another with --port\n"
    )


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_others_reach_it_only_with_a_key(host: str, lab: Path, command_line: CommandLine) -> None:
    code, stdout, stderr = command_line("serve", LAB, "--host", host)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert "give an API key (--api-key-file FILE, or TUNEMILL_API_KEY)" in stderr


def test_addresses() -> None:
    assert choose_address("0.0.0.0", 0, protected=True).host == "0.0.0.0"
    assert Address("0.0.0.0", 80).url == "http://127.0.0.1:80/v1"
    assert Address("::1", 80).url == "http://[::1]:80/v1"
    with pytest.raises(UsageError, match=r"--host no\.such\.host\.invalid"):
        choose_address("no.such.host.invalid", 80, protected=True)


@pytest.mark.parametrize("text", ["", "\n", "two,keys\n"])
def test_a_file_without_a_key_is_refused(
    text: str, lab: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    (tmp_path / "key").write_text(text)
    code, _, stderr = command_line("serve", LAB, "--api-key-file", str(tmp_path / "key"))
    assert code == 2
    assert "its first line is no key" in stderr


def test_a_pulled_folder_is_recognised_and_a_changed_one_is_not(
    lab: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    folder = tmp_path / "pulled"
    assert command_line("pull", LAB, "--to", str(folder))[0] == 0
    code, stdout, _ = command_line("serve", str(folder), "--dry-run", "--port", "0")
    assert code == 0
    assert stdout.startswith(f"would serve {LAB}@sha256:")
    copy = shutil.copytree(folder, tmp_path / "copy")
    model = copy / "model-F16.gguf"
    model.chmod(0o644)
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    code, stdout, stderr = command_line("serve", str(copy), "--port", "0")
    assert (code, stdout) == (78, "")
    assert "where the files in" in stderr.splitlines()[-1]


def test_what_another_kind_of_host_quantized_is_refused(lab: Path, command_line: CommandLine) -> None:
    made = {"stage": "quantize", "host": {"host_class": "cuda/sm_90/-/gcc-9.1.0/llama-0.1-ggml-0.1-00000000"}}
    publish(open_store(str(lab / "store")), lab / "model", "lab/gguf-q4_k_m", **made)
    code, stdout, stderr = command_line("serve", "lab/gguf-q4_k_m", "--port", "0")
    assert (code, stdout) == (78, "")
    assert "another kind of host" in stderr
    assert "tunemill quantize --run lab --set quant=Q4_K_M" in stderr


def test_what_is_rendered_otherwise_than_in_training_is_refused(
    lab: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    folder = shutil.copytree(lab / "model", tmp_path / "model")
    Prompting(f"{TEMPLATE}!", "<s>", "</s>", add_bos=True).save(folder)
    publish(open_store(str(lab / "store")), folder, "lab/gguf-odd")
    code, stdout, stderr = command_line("serve", "lab/gguf-odd", "--port", "0")
    assert (code, stdout) == (78, "")
    assert "renders conversations otherwise than training" in stderr


def test_a_folder_of_no_known_artifact_is_served_once_it_has_proved_itself(lab: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(lab / "model", tmp_path / "model")
    (folder / "note.txt").write_text("so that no artifact has these files")
    found = start(str(folder), "--reprove")
    assert found.ask("/models")[1]["data"][0]["id"] == "model"
    found.process.terminate()
    _, stderr = found.process.communicate(timeout=SECONDS)
    assert "proved on this one by 3 prompts" in stderr
    assert "model: verified; 3 conversations rendered as in training" in stderr


def test_a_folder_of_no_known_artifact_without_probes_is_refused(
    lab: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    folder = shutil.copytree(lab / "model", tmp_path / "model")
    (folder / "probes.json").unlink()
    code, stdout, stderr = command_line("serve", str(folder), "--port", "0", "--reprove")
    assert (code, stdout) == (78, "")
    assert "has no probes.json to be proved by" in stderr


def test_a_server_that_is_not_there_is_said_with_the_remedy(
    lab: Path, monkeypatch: pytest.MonkeyPatch, command_line: CommandLine, tmp_path: Path
) -> None:
    monkeypatch.setenv("TUNEMILL_LLAMA_SERVER", str(tmp_path / "none"))
    code, _, stderr = command_line("serve", LAB)
    assert code == 78
    assert "is no program" in stderr
    monkeypatch.delenv("TUNEMILL_LLAMA_SERVER")
    monkeypatch.setattr(llama_server.source, "installed_version", lambda: "0.0.0")
    monkeypatch.setattr(llama_server, "installed", lambda: tmp_path)
    code, _, stderr = command_line("serve", LAB)
    assert code == 78
    assert stderr.endswith("is missing: run python -m tunemill.gguf.server\n")

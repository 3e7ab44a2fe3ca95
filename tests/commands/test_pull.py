"""``tunemill pull``: what arrives is what was published, and the command it prints really runs it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from backends import open_environment, provenance, s3_environment
from counting import save_data, save_model, save_prompting
from tunemill import cli, host
from tunemill.errors import BadDataError
from tunemill.gguf import selfcheck
from tunemill.ggufs import first_part
from tunemill.progress import Progress
from tunemill.store import Store, create_store, open_store
from unreliable import Misbehaviour, Seen, unreliable

Pull = Callable[..., tuple[int, str, str]]
QUIET = Progress(quiet=True)
LAB = "lab/gguf-q4_k_m"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the counting model quantized here, and the data of its task."""
    folder = tmp_path_factory.mktemp("lab")
    model, data, store = folder / "model", folder / "data", folder / "store"
    save_model(model)
    save_data(data)
    environment = {**os.environ, "TUNEMILL_STORE": str(store), "TUNEMILL_CACHE": str(folder / "cache")}
    for words in (
        "store create",
        f"store push {model} lab/gguf-f16 --kind gguf",
        f"store push {data} lab/data --kind data",
        "quantize --run lab --set quant=Q4_K_M",
    ):
        program = [sys.executable, "-m", "tunemill.cli", *words.split()]
        subprocess.run(program, env=environment, check=True, capture_output=True)
    return store


@pytest.fixture
def pull(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Pull:
    """Run ``tunemill pull`` in an empty directory, on a copy of the store; returns code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNEMILL_STORE", str(shutil.copytree(lab, tmp_path / "store")))
    monkeypatch.setenv("TUNEMILL_CACHE", str(tmp_path / "cache"))

    def call(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        cli._talk_on_stderr()
        code = cli.run(["pull", *words])
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def store(pull: Pull, tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def test_it_arrives_and_the_printed_command_classifies_with_it(pull: Pull, store: Store) -> None:
    code, stdout, stderr = pull("--run", "lab")
    assert code == 0, stderr
    path, command = stdout.splitlines()
    assert path == "models/lab-Q4_K_M/model-Q4_K_M.gguf"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = store.resolve(done.stdout.strip())
    assert made.name == "lab/predictions-q4_k_m"
    assert made.facts["rows"] == 3
    assert store.provenance(made).inputs["gguf"] == store.resolve(LAB).reference
    store.pull(made, Path("predictions"), QUIET)
    table = pyarrow.parquet.read_table("predictions/predictions.parquet")
    assert table["label"].to_pylist() == ["def", "wxy", "def"]


def test_the_second_time_nothing_travels(pull: Pull, tmp_path: Path) -> None:
    first = pull("--run", "lab", "--quant", "q4_k_m")
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "store/blobs").rename(tmp_path / "unplugged")
    (tmp_path / "store/blobs/sha256").mkdir(parents=True)
    for small in (tmp_path / "unplugged/sha256").iterdir():  # provenance is asked for, weights are not
        if small.stat().st_size < 100_000:
            shutil.copy(small, tmp_path / "store/blobs/sha256")
    code, stdout, stderr = pull("--run", "lab", "--quant", "Q4_K_M")
    assert (code, stdout) == first[:2]
    assert "models/lab-Q4_K_M is there already, verified: lab/gguf-q4_k_m@sha256:" in stderr


def test_json_is_one_object(pull: Pull, store: Store) -> None:
    code, stdout, _ = pull(LAB, "--to", "here", "--json")
    assert code == 0
    told = json.loads(stdout)
    command = told.pop("command")
    assert told == {
        "reference": store.resolve(LAB).reference,
        "path": "here/model-Q4_K_M.gguf",
        "fetched": True,
        "made_elsewhere": False,
        "architecture": "llama",
        "file_type": "Q4_K_M",
    }
    assert shlex.split(command)[1:4] == ["infer", "--run", "lab"]
    assert json.loads(pull(LAB, "--to", "here", "--json")[1])["fetched"] is False


def test_the_command_repeats_how_the_recipe_was_chosen(pull: Pull, tmp_path: Path) -> None:
    (tmp_path / "oak.yaml").write_text("")
    (tmp_path / "parts.yaml").write_text("")
    words = ["--model", "oak.yaml", "--task", "parts.yaml", "--run", "lab", "--set", "limit=1"]
    command = shlex.split(pull(*words)[1].splitlines()[1])
    assert command[1:10] == ["infer", *words]
    assert command[10:12] == ["--set", "quant=Q4_K_M"]


class TestWhatIsThereAlready:
    def test_damage_is_noticed_left_alone_and_not_repeated_from_the_cache(
        self, pull: Pull, tmp_path: Path
    ) -> None:
        path = Path(pull("--run", "lab")[1].splitlines()[0])
        whole = path.read_bytes()
        before = path.stat()
        path.chmod(0o644)
        with path.open("r+b") as target:
            target.seek(100_000)
            target.write(b"damaged")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a failing disk leaves it
        damaged = path.read_bytes()
        code, stdout, stderr = pull("--run", "lab")
        assert (code, stdout) == (65, "")
        assert f"{path} has other bytes than were published: remove models/lab-Q4_K_M" in stderr
        assert stderr.count("\n") == 1
        assert path.read_bytes() == damaged
        shutil.rmtree(path.parent)
        assert pull("--run", "lab")[0] == 0
        assert path.read_bytes() == whole

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            pytest.param(lambda place: (place / "notes.txt").write_text(""), "foreign notes.txt", id="more"),
            pytest.param(
                lambda place: (place / "prompting.json").unlink(), "lacks prompting.json", id="less"
            ),
            pytest.param(
                lambda place: (shutil.rmtree(place), place.write_text("")), "is no directory", id="a file"
            ),
            pytest.param(
                lambda place: (place / "link").symlink_to("/etc/passwd"), "foreign link", id="a link"
            ),
        ],
    )
    def test_other_files_are_left_alone(
        self, pull: Pull, tmp_path: Path, change: Callable[[Path], object], reason: str
    ) -> None:
        place = tmp_path / "models/lab-Q4_K_M"
        pull("--run", "lab")
        change(place)
        before = sorted(tmp_path.glob("models/**"))
        code, stdout, stderr = pull("--run", "lab")
        assert (code, stdout, stderr.count("\n")) == (2, "", 1)
        assert reason in stderr
        assert "pull to another place" in stderr
        assert sorted(tmp_path.glob("models/**")) == before


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        pytest.param((), 2, "needs --run, or --model and --task", id="nothing chosen"),
        pytest.param(("--run", "lba"), 2, "did you mean lab/gguf-", id="unknown run"),
        pytest.param(("--run", "lab", "--quant", "Q8_0"), 2, "did you mean lab/gguf-", id="not made"),
        pytest.param(("--model", "elm", "--task", "cap"), 2, "unknown model 'elm'", id="unknown model"),
        pytest.param(("lab/data",), 2, "is data, expected gguf: 'tunemill store pull'", id="other kind"),
        pytest.param(("Lab",), 2, "no artifact name", id="malformed reference"),
        pytest.param(("--run", "lab", "--store", "nowhere"), 78, "tunemill store create", id="no store"),
    ],
)
def test_bad_requests_are_one_line(pull: Pull, words: tuple[str, ...], code: int, message: str) -> None:
    got, stdout, stderr = pull(*words)
    assert (got, stdout, stderr.count("\n")) == (code, "", 1)
    assert message in stderr
    assert not Path("models").exists()


def publish(store: Store, folder: Path, name: str, **changes: Any) -> str:
    from tunemill.store import Draft

    values: dict[str, Any] = {"kind": "gguf", "facts": {}, "provenance": provenance(), **changes}
    return store.publish(Draft(name=name, directory=folder, **values), QUIET).reference


@pytest.mark.parametrize("known_before", [True, False])
def test_an_architecture_that_llama_cpp_lacks(
    pull: Pull, store: Store, tmp_path: Path, known_before: bool
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    selfcheck.write_gguf(folder / "model-F16.gguf", {"general.architecture": "fancy"}, {"a": np.ones(32)})
    publish(store, folder, "odd/gguf-f16", facts={"architecture": "fancy"} if known_before else {})
    code, stdout, stderr = pull("odd/gguf-f16")
    assert (code, stdout) == (78, "")
    assert "of the architecture 'fancy', which llama-cpp-python" in stderr
    assert Path("models").exists() != known_before, "what is known beforehand costs no transfer"


def test_without_llama_cpp_nothing_is_said_about_it(
    pull: Pull, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    selfcheck.write_gguf(folder / "model-F16.gguf", {"general.architecture": "fancy"}, {"a": np.ones(32)})
    publish(store, folder, "odd/gguf-f16", facts={"architecture": "fancy"})
    bare = replace(host.this_host(), llama_cpp=None)
    monkeypatch.setattr(host, "this_host", lambda: bare)
    code, stdout, stderr = pull("odd/gguf-f16")
    assert (code, stdout) == (0, "models/odd-F16/model-F16.gguf\n")
    assert stderr.startswith("no command runs it here: ")


def test_a_quantization_of_another_host_comes_with_the_way_to_make_it_here(
    pull: Pull, store: Store, tmp_path: Path
) -> None:
    store.pull(store.resolve(LAB), tmp_path / "copy", QUIET)
    made = provenance(stage="quantize", host={"host_class": "cuda/sm_90/-/llama-0.3.36"})
    publish(store, tmp_path / "copy", "lab/gguf-q5_k_m", provenance=made)
    code, stdout, stderr = pull("--run", "lab", "--quant", "Q5_K_M")
    assert code == 0
    assert len(stdout.splitlines()) == 2
    assert " --requantize --store " in stdout.splitlines()[1]  # it has no probe set to be proved by
    assert "on another kind of host (cuda/sm_90/-/llama-0.3.36) than this one (" in stderr
    again = subprocess.run(stderr.strip().rpartition("to do it here: ")[2], shell=True, check=False)
    assert again.returncode == 0
    assert store.provenance(store.resolve("lab/gguf-q5_k_m")).stage == "quantize"
    code, _, stderr = pull("--run", "lab", "--quant", "Q5_K_M", "--to", "mine")
    assert (code, stderr) == (0, "")


def test_a_model_without_data_comes_without_a_command(pull: Pull, store: Store, tmp_path: Path) -> None:
    store.pull(store.resolve(LAB), tmp_path / "copy", QUIET)
    publish(store, tmp_path / "copy", "alone/gguf-q4_k_m")
    code, stdout, stderr = pull("alone/gguf-q4_k_m")
    assert (code, stdout) == (0, "models/alone-Q4_K_M/model-Q4_K_M.gguf\n")
    assert "no command runs it here: infer needs data" in stderr


class TestSplit:
    def test_all_parts_come_and_run_by_the_first(self, pull: Pull, store: Store, tmp_path: Path) -> None:
        folder = tmp_path / "split"
        folder.mkdir()
        parts = split_counting_model(folder)
        assert len(parts) > 1
        save_prompting(folder)
        publish(store, folder, "lab/gguf-split")
        code, stdout, stderr = pull("lab/gguf-split")
        assert code == 0, stderr
        path, command = stdout.splitlines()
        assert path == f"models/lab-SPLIT/{parts[0]}"
        assert {each.name for each in Path(path).parent.glob("*.gguf")} == set(parts)
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("lab/predictions-split@")

    def test_a_missing_part_is_noticed_before_anything_travels(
        self, pull: Pull, store: Store, tmp_path: Path
    ) -> None:
        folder = tmp_path / "split"
        folder.mkdir()
        (folder / split_counting_model(folder)[1]).unlink()
        publish(store, folder, "lab/gguf-split")
        code, _, stderr = pull("lab/gguf-split")
        assert code == 65
        assert "part 2 of " in stderr
        assert not Path("models").exists()

    @pytest.mark.parametrize(
        "names",
        [
            (),
            ("a.safetensors",),
            ("a.gguf", "b.gguf"),
            ("a.gguf", "a-00001-of-00001.gguf"),
            ("a-00001-of-00002.gguf", "b-00002-of-00002.gguf"),
        ],
    )
    def test_no_or_several_models_are_refused(self, names: tuple[str, ...]) -> None:
        with pytest.raises(BadDataError, match="expected one GGUF model, found"):
            first_part(names)


def split_counting_model(folder: Path) -> list[str]:
    """Write the counting model in parts, as llama.cpp's own tools do; return their names."""
    from gguf import GGUFReader, GGUFWriter

    selfcheck.write_counting_model(folder / "whole")
    whole = GGUFReader(folder / "whole")
    writer = GGUFWriter(folder / "model-F16.gguf", "llama", split_max_tensors=12)
    for key, field in whole.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], *field.types[1:2])
    for tensor in whole.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "whole").unlink()
    return sorted(path.name for path in folder.glob("*.gguf"))


@pytest.mark.parametrize("server", [pytest.param("moto"), pytest.param("real", marks=pytest.mark.s3)])
def test_a_killed_pull_goes_on(
    server: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fourth of five ranges is held up until the process is killed; three are not sent again."""
    folder = tmp_path / "big"
    folder.mkdir()
    numbers = np.random.default_rng(1).normal(size=(2**25 + 2**22, 1)).astype("f2")
    selfcheck.write_gguf(folder / "model-F16.gguf", {"general.architecture": "llama"}, {"big": numbers})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNEMILL_CACHE", str(tmp_path / "cache"))
    url = f"s3://tunemill-{uuid.uuid4().hex[:16]}/lab"
    words = [sys.executable, "-m", "tunemill.cli", "pull", "big/gguf-f16", "--store", url]
    with open_environment(server, request):
        store = create_store(url)[0]
        publish(store, folder, "big/gguf-f16")
        keys = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
        reached, killed = threading.Event(), threading.Event()

        def hold(seen: Seen) -> None:
            if ranges(slow) > 3:
                reached.set()
                killed.wait(60)

        slow = Misbehaviour(refuse=lambda seen: hold(seen) if "Range" in seen.headers else None)
        with unreliable(store.backend.endpoint, slow) as proxy, s3_environment(proxy, *keys):
            process = subprocess.Popen(words)
            assert reached.wait(60)
            wait_for_record(tmp_path / "cache/.partial")
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed.set()
        assert not Path("models/big-F16").exists()
        again = Misbehaviour()
        with unreliable(store.backend.endpoint, again) as proxy, s3_environment(proxy, *keys):
            done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "models/big-F16/model-F16.gguf\n"
    assert Path(done.stdout.strip()).read_bytes() == (folder / "model-F16.gguf").read_bytes()
    assert ranges(again) == 2


def ranges(misbehaviour: Misbehaviour) -> int:
    return sum("Range" in seen.headers for seen in misbehaviour.seen)


def wait_for_record(folder: Path) -> None:
    """Wait until three ranges are recorded as complete."""
    for _ in range(600):
        records = list(folder.glob("*.done"))
        if records and len(records[0].read_bytes().splitlines()) >= 3:
            return
        time.sleep(0.1)
    raise AssertionError("no range was completed")

"""Several processes train as one does: real torchrun, gloo, a directory store, kills and signals."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import micro
import psutil
import pytest
from safetensors.torch import load_file

from backends import provenance
from tunemill.errors import UsageError
from tunemill.progress import Progress
from tunemill.store import Draft, Store, open_store
from tunemill.train.ranks import Share, share_step
from tunemill.train.sft import train
from tunemill.train.trainer import LengthGroups, Padded, Shuffled

pytestmark = pytest.mark.timeout(300)
SETTINGS = {"max_steps": 16, "save_steps": 3, "per_device_train_batch_size": 4, "lora_dropout": 0.0}
SETTINGS |= {"preflight": False}  # no llama.cpp knows a tokenizer of words
TOLERANCE = 1e-4
"""Between losses of one process and of two: sums of float32 in another order, through AdamW."""
ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Lab:
    """A store with base and data, and recipes for them."""

    root: Path
    store: Store

    def command(self, launcher: Sequence[str], *settings: str) -> list[str]:
        words = [word for setting in settings for word in ("--set", setting)]
        recipe = ["--model", str(self.root / "micro.yaml"), "--task", str(self.root / "colors.yaml")]
        store = ["--store", str(self.root / "store"), "--json"]
        start = [sys.executable, "-m", *launcher, "tunemill.cli", "train"]
        return [*start, *recipe, *store, *words]

    def start(self, launcher: Sequence[str], *settings: str) -> subprocess.Popen[str]:
        environment = {
            **{name: value for name, value in os.environ.items() if name != "TUNEMILL_STORE"},
            "TUNEMILL_CACHE": str(self.root / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            self.command(launcher, *settings),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def adapter(self, name: str) -> Path:
        found = self.store.find("micro-colors/adapter")
        assert found is not None
        self.store.pull(found, self.root / name, Progress(quiet=True))
        return self.root / name

    def checkpoint(self) -> int:
        """Return the step of the newest checkpoint of the one action; 0 if there is none."""
        names = [name for name in self.store.names() if "/checkpoint-" in name]
        found = self.store.find(names[0]) if names else None
        return int(found.facts["step"]) if found else 0

    def wait_for_checkpoint(self, step: int, launcher: subprocess.Popen[str]) -> None:
        while self.checkpoint() < step:
            assert launcher.poll() is None, launcher.communicate()[1]
            time.sleep(0.02)


@pytest.fixture
def lab(tmp_path: Path, base: Path, data: Path) -> Lab:
    recipe = {**micro.TINY, **SETTINGS}
    (tmp_path / "micro.yaml").write_text(json.dumps(recipe))
    (tmp_path / "colors.yaml").write_text("{}")
    store = open_store(str(tmp_path / "store"), create=True)
    for name, kind, directory in (("base/micro", "base", base), ("micro-colors/data", "data", data)):
        store.publish(Draft(name, kind, directory, {}, provenance(inputs={})), Progress(quiet=True))
    return Lab(tmp_path, store)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def worker(launcher: subprocess.Popen[str], rank: int) -> psutil.Process:
    """Return the process of a rank, once it runs."""
    while True:
        assert launcher.poll() is None
        for child in psutil.Process(launcher.pid).children():
            if child.environ().get("RANK") == str(rank):
                return child
        time.sleep(0.02)


def losses(adapter: Path) -> list[float]:
    with (adapter / "metrics.csv").open(newline="") as source:
        return [float(row["loss"]) for row in csv.DictReader(source)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Path:
    """What one process makes of the same recipe."""
    work = micro.make_work(tmp_path_factory.mktemp("alone"), base, data, **SETTINGS)
    train(work)
    return work.output


def same_training(left: Path, right: Path) -> None:
    assert losses(left) == pytest.approx(losses(right), abs=TOLERANCE)
    ones, others = load_file(left / ADAPTER), load_file(right / ADAPTER)
    assert ones.keys() == others.keys()
    for name, one in ones.items():
        assert float((one - others[name]).abs().max()) < TOLERANCE, name


@pytest.mark.slow
def test_two_nodes_train_as_one_process_does(lab: Lab, alone: Path) -> None:
    """They share a disk here, as on many clusters, and each has its own directory there."""
    meet = [
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}",
    ]
    launcher = ["torch.distributed.run", *meet, "-m"]
    nodes = [lab.start(launcher) for _ in range(2)]
    said = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    (result,) = [json.loads(out) for out, _ in said if out]
    assert (result["facts"]["processes"], result["facts"]["global_batch"]) == (2, 4)
    assert sum("train: running for" in err for _, err in said) == 1
    same_training(lab.adapter("two"), alone)
    assert not [path for path in (lab.root / "cache" / "work").iterdir() if path.is_dir()]


@pytest.mark.slow
def test_killed_then_stopped_it_goes_on_from_the_newest_checkpoint(lab: Lab, alone: Path) -> None:
    launcher = ["tunemill.train.launch", "--nproc-per-node=2", "--max-restarts=1", "-m"]
    first = lab.start(launcher)
    lab.wait_for_checkpoint(3, first)
    victim = worker(first, 1)
    victim.kill()
    reached = lab.checkpoint()
    lab.wait_for_checkpoint(reached + 3, first)
    worker(first, 1).send_signal(signal.SIGTERM)  # one of them alone, and both save and end
    _, said = first.communicate(timeout=100)
    assert first.returncode == 143, said
    assert "is gone" in said
    assert "going on from step" in said
    stopped_after = lab.checkpoint()
    assert stopped_after > reached
    second = lab.start(())  # what two left, one goes on from
    out, said = second.communicate(timeout=100)
    assert second.returncode == 0, said
    assert json.loads(out)["facts"]["resumed_from_step"] == stopped_after
    same_training(lab.adapter("two then one"), alone)


DIFFERENT = """
import os, sys
from tunemill import cli
cli.main([*sys.argv[1:], "--set", "seed=" + os.environ["RANK"]])
"""


def test_processes_with_different_settings_do_not_train_together(lab: Lab) -> None:
    (lab.root / "different.py").write_text(DIFFERENT)
    command = lab.command(("tunemill.train.launch", "--nproc-per-node=2"))
    program = [word if word != "tunemill.cli" else str(lab.root / "different.py") for word in command]
    environment = {**os.environ, "TUNEMILL_CACHE": str(lab.root / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "the 2 processes of train were started with different settings or versions" in done.stderr
    assert lab.store.names() == ["base/micro", "micro-colors/data"]


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
if os.environ["RANK"] == "1" and sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ["RANK"] == "1" and sys.argv[1].isdecimal():
    sys.exit(int(sys.argv[1]))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
Path(sys.argv[2]).touch()
time.sleep(60 if sys.argv[1] != "0" else 0)
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        pytest.param("0", 0, id="well"),
        pytest.param("65", 65, id="bad data on one process"),
        pytest.param("killed", 75, id="one process killed"),
        pytest.param("SIGTERM", 143, id="stopped"),
    ],
)
def test_the_launcher_ends_with_the_code_of_the_cause(tmp_path: Path, end: str, code: int) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    started = tmp_path / "started"
    words = ["--nproc-per-node=2", str(tmp_path / "program.py"), end, str(started)]
    launcher = subprocess.Popen([sys.executable, "-m", "tunemill.train.launch", *words])
    if end == "SIGTERM":
        while not started.exists():
            time.sleep(0.02)
        launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=60) == code


def test_a_stage_of_one_process_refuses_torchrun(lab: Lab) -> None:
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    command = [word if word != "train" else "merge" for word in lab.command(())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "tunemill: merge runs in one process: start it without torchrun"


@pytest.mark.parametrize(
    ("recipe", "size", "share"),
    [
        pytest.param((4, 4), 1, Share(4, 4, 16), id="alone"),
        pytest.param((4, 4), 2, Share(4, 2, 16), id="fewer batches"),
        pytest.param((4, 4), 8, Share(2, 1, 16), id="smaller batches"),
        pytest.param((4, 3), 6, Share(2, 1, 12), id="less of both"),
        pytest.param((6, 2), 3, Share(4, 1, 12), id="not of whole batches"),
    ],
)
def test_the_rows_of_a_step_are_shared(recipe: tuple[int, int], size: int, share: Share) -> None:
    assert share_step(*recipe, size) == share


def test_rows_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(UsageError, match=r"the 16 rows of a step .* cannot be shared evenly by 3 processes"):
        share_step(4, 4, 3)


def sharded(order: Padded, batch: int, size: int) -> list[list[int]]:
    """Return what accelerate gives each process."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    whole = BatchSampler(order, batch, drop_last=False)
    return [[row for rows in BatchSamplerShard(whole, size, rank) for row in rows] for rank in range(size)]


def orders(rows: int) -> Iterator[Shuffled | LengthGroups]:
    yield Shuffled(rows, 42)
    yield LengthGroups([number * 7 % 5 for number in range(rows)], 6, 42)


@pytest.mark.parametrize("rows", [1, 5, 12, 17, 18])
@pytest.mark.parametrize(("batch", "size"), [(1, 2), (3, 2), (2, 3)])
def test_the_processes_have_every_row_once_and_those_of_a_step_together(
    rows: int, batch: int, size: int
) -> None:
    for order in orders(rows):
        for epoch in (0, 1):
            order.set_epoch(epoch)
            parts = sharded(Padded(order, 0, batch * size, rows), batch, size)
            assert len({len(part) for part in parts}) == 1
            expected = list(order)
            for step in range(0, rows, batch * size):
                start = step // size
                found = {row for part in parts for row in part[start : start + batch]} - {rows}
                assert found == set(expected[step : step + batch * size])

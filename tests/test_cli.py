"""The command line as a user meets it: what is printed where, and which code comes back."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from toys import LISTED, TOYS
from tunemill import cli, errors, stages

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """``run(*words)`` in an empty directory returns code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNEMILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TUNEMILL_STORE", raising=False)
    (tmp_path / "oak.yaml").write_text("seed: 3\n")

    def run_one(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        cli._talk_on_stderr()
        code = cli.run(words)
        return code, *capfd.readouterr()

    return run_one


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the toy stages stand for the real ones."""
    for table in (stages.LISTED, cli.LISTED):
        for name in list(table):
            monkeypatch.delitem(table, name, raising=False)
        for name, listed in LISTED.items():
            monkeypatch.setitem(table, name, listed)
    assert stages.load_stages() == TOYS


OAK = ("--model", "oak.yaml", "--run", "forest")


@pytest.mark.usefixtures("toys")
class TestStages:
    def test_the_result_is_the_reference_and_all_else_is_talk(self, run: Run) -> None:
        code, stdout, stderr = run("plant", *OAK)
        assert code == 0
        assert stdout.startswith("base/oak@sha256:")
        assert stdout.count("\n") == 1
        assert "running" in stderr

    def test_reuse_is_said_with_its_reference(self, run: Run) -> None:
        _, reference, _ = run("plant", *OAK)
        code, stdout, stderr = run("plant", *OAK)
        assert (code, stdout) == (0, reference)
        assert f"reusing {reference.strip()}" in stderr

    def test_quiet_says_nothing(self, run: Run) -> None:
        code, stdout, stderr = run("--quiet", "plant", *OAK)
        assert (code, stderr) == (0, "")
        assert stdout

    def test_json_is_exactly_one_line(self, run: Run) -> None:
        code, stdout, _ = run("plant", *OAK, "--json")
        assert code == 0
        assert stdout.count("\n") == 1
        assert json.loads(stdout)["facts"] == {"seed": 3}

    def test_a_dry_run_shows_origins_and_inputs_and_runs_nothing(self, run: Run, tmp_path: Path) -> None:
        base = run("plant", *OAK)[1].strip()
        code, stdout, _ = run("grow", *OAK, "--set", "steps=2", "--dry-run")
        assert code == 0
        assert "steps" in stdout
        assert "(flag)" in stdout
        assert f"input base: {base}" in stdout
        assert stdout.endswith("would run\n")
        assert run("store", "ls", "--json")[1].count("forest") == 0

    def test_a_dry_run_of_what_exists_names_it(self, run: Run) -> None:
        made = run("plant", *OAK)[1].strip()
        assert run("plant", *OAK, "--dry-run")[1].endswith(f"would reuse {made}\n")
        shown = json.loads(run("plant", *OAK, "--dry-run", "--json")[1])
        assert (shown["would_run"], shown["reference"]) == (False, made)
        assert shown["config"]["seed"] == {"value": 3, "origin": "file oak.yaml"}

    def test_a_dry_run_without_its_inputs_says_what_makes_them(self, run: Run) -> None:
        code, stdout, _ = run("grow", *OAK, "--dry-run")
        assert code == 0
        assert "tunemill fetch" in stdout

    @pytest.mark.parametrize(
        ("words", "code", "message"),
        [
            pytest.param(("plant", *OAK, "--set", "sed=1"), 2, "did you mean seed", id="unknown key"),
            pytest.param(("plant", *OAK, "--set", "seed=-1"), 2, "seed=-1 (flag)", id="wrong value"),
            pytest.param(("plant", *OAK, "--set", "seed=13"), 2, "no luck", id="stage's own check"),
            pytest.param(("plant", "--model", "elm"), 2, "unknown model 'elm'", id="unknown model"),
            pytest.param(("plant",), 2, "needs --model", id="no model"),
            pytest.param(("grow", *OAK), 2, "no 'base/oak'", id="no input"),
            pytest.param(("grow", *OAK, "--input", "base"), 2, "ROLE=REF", id="malformed input"),
            pytest.param(
                ("grow", *OAK, "--input", "base=x/a", "--input", "base=x/b"), 2, "twice", id="role twice"
            ),
            pytest.param(("plant", *OAK, "--nonsense"), 2, "--nonsense", id="unknown option"),
            pytest.param(("plnat",), 2, "No such command 'plnat'", id="unknown command"),
            pytest.param(("plant", *OAK, "--store", "/no/such/store"), 78, "/no/such", id="no store"),
            pytest.param(("plant", *OAK, "--store", "ftp://x/y"), 2, "ftp://x/y", id="no such scheme"),
            pytest.param(("grow", *OAK, "--set", "fail=data"), 65, "the seed is rotten", id="bad data"),
            pytest.param(("grow", *OAK, "--set", "fail=missing"), 78, "'no_such_library'", id="no library"),
            pytest.param(("grow", *OAK, "--set", "fail=bug"), 70, "ZeroDivisionError", id="bug"),
        ],
    )
    def test_a_failure_is_one_line_and_its_code(
        self, run: Run, words: tuple[str, ...], code: int, message: str
    ) -> None:
        if "fail" in words[-1]:
            run("plant", *OAK)
        returned, stdout, stderr = run("--quiet", *words)
        assert (returned, stdout) == (code, "")
        assert message in stderr
        assert stderr.startswith("tunemill: ")
        assert stderr.count("\n") == 1

    def test_debug_shows_the_traceback(self, run: Run) -> None:
        run("plant", *OAK)
        code, _, stderr = run("--debug", "grow", *OAK, "--set", "fail=bug")
        assert code == 70
        assert "Traceback" in stderr

    def test_the_default_store_is_made_and_another_is_not(self, run: Run, tmp_path: Path) -> None:
        assert run("plant", *OAK)[0] == 0
        assert (tmp_path / ".tunemill" / "store").is_dir()
        assert run("plant", *OAK, "--store", "elsewhere")[0] == 78
        assert not (tmp_path / "elsewhere").exists()

    def test_help_lists_the_keys(self, run: Run) -> None:
        code, stdout, _ = run("plant", "--help")
        assert code == 0
        assert "seed       Number written into the file  [1]" in stdout
        assert stdout.rstrip().endswith("tunemill plant --model tiny --task stdlib --dry-run")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        pytest.param(found("x"), found.exit_code, id=found.__name__)
        for found in vars(errors).values()
        if isinstance(found, type) and issubclass(found, errors.TunemillError)
    ]
    + [
        pytest.param(OSError(errno.ENOSPC, "No space left on device"), 75, id="full disk"),
        pytest.param(OSError(errno.EDQUOT, "Disk quota exceeded"), 75, id="quota"),
        pytest.param(OSError(errno.EIO, "Input/output error"), 70, id="other OSError"),
        pytest.param(PermissionError(errno.EACCES, "Permission denied", "/x"), 77, id="no permission"),
        pytest.param(MemoryError(), 78, id="no memory"),
        pytest.param(KeyboardInterrupt(), 130, id="KeyboardInterrupt"),
        pytest.param(ModuleNotFoundError("x", name="tunemill.gone"), 70, id="own module missing"),
        pytest.param(ValueError("two\nlines"), 70, id="bug"),
    ],
)
def test_every_error_has_its_code_and_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli.Lazy, "get_command", lambda *_: click.Command("fail", callback=fail))
    returned, _, stderr = run("fail")
    assert returned == code
    assert stderr.strip().count("\n") == 0  # click itself puts an empty line before Ctrl-C's


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        f"'{sys.executable}' -m tunemill.cli train --help | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("Usage")
    assert done.stderr == ""


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"tunemill, version {cli.__version__}\n", "")


def test_recipe_list_and_show(run: Run) -> None:
    listed = json.loads(run("recipe", "list", "--json")[1])
    assert {"tiny", "llama3", "qwen3-0.6b"} <= set(listed["models"])
    assert {"stdlib", "cap", "dataverse", "flourishing", "alpaca", "tatqa"} == set(listed["tasks"])
    shown = run("recipe", "show", "--model", "llama3", "--task", "cap", "--set", "r=8")[1]
    assert "r: 8  # flag\n" in shown
    assert "learning_rate: 0.0002  # recipe models/llama3\n" in shown
    as_json = json.loads(run("recipe", "show", "--model", "llama3", "--task", "cap", "--json")[1])
    assert as_json["run"] == "llama3-cap"
    assert as_json["settings"]["label_column"] == {"value": "label", "origin": "recipe tasks/cap"}


def test_doctor_names_a_store_that_is_not_there(run: Run) -> None:
    code, stdout, stderr = run("doctor", "--store", "/no/such/store")
    assert code == 78
    assert "MISSING store" in stdout
    assert "missing: store" in stderr
    found: list[dict[str, Any]] = json.loads(run("doctor", "--json")[1])
    assert {"Python", "C++ compiler", "disk", "memory", "GPU", "host class", "store"} <= {
        finding["name"] for finding in found
    }


def test_environment_variables_stand_for_options(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEMILL_STORE", "/no/such/store")
    monkeypatch.setenv("TUNEMILL_MODEL", "tiny")
    assert run("fetch", "--dry-run")[0] == 78


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tunemill.cli", "nonsense"],
        cwd=tmp_path,
        env={**os.environ, "TUNEMILL_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "tunemill: No such command 'nonsense' (see 'tunemill --help')\n"

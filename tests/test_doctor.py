"""The doctor works before anything is installed, and finds what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunemill import doctor

TOOLS = Path(__file__).parents[1] / "tools"


def run_doctor(path: str) -> subprocess.CompletedProcess[str]:
    """Run it with the standard library alone (``-S -E`` hide installed packages)."""
    program = (
        f"import runpy, sys; sys.path.insert(0, {str(TOOLS)!r}); "
        "runpy.run_module('tunemill.doctor', run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-S", "-E", "-c", program],
        env={"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_any_package_it_names_the_installation() -> None:
    done = run_doctor(os.environ["PATH"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not installed yet -> make install" in done.stdout


def test_a_machine_without_a_compiler_is_told_how_to_get_one(tmp_path: Path) -> None:
    done = run_doctor(str(tmp_path))
    assert done.returncode == 78
    assert "MISSING C++ compiler" in done.stdout
    assert "MISSING make" in done.stdout
    assert done.stderr == ""


def test_a_missing_library_names_its_stage_and_extra() -> None:
    finding = doctor.stage_packages("train", ("sys", "a_package_nobody_has"))
    assert (finding.state, finding.name) == ("note", "train")
    assert finding.detail == "without a_package_nobody_has"
    assert "tunemill[train]" in finding.remedy


def test_an_old_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (99, 0))
    assert doctor.python().state == "missing"


def test_a_broken_driver_is_shown_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'driver/library version mismatch'\nexit 18\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    finding = doctor.accelerator()
    assert (finding.state, finding.detail) == ("note", "driver/library version mismatch")

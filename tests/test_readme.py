"""The README's commands exist, and its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tunemill import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def targets() -> set[str]:
    return {
        name
        for line in (ROOT / "Makefile").read_text().splitlines()
        if (match := re.match(r"([a-z0-9-][a-z0-9 -]*):", line))
        for name in match[1].split()
    }


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make ")])
def test_every_make_target_exists(command: str) -> None:
    named = [word for word in command.split()[1:] if re.fullmatch(r"[a-z0-9-]+", word)]
    assert named
    assert set(named) <= targets()


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith(".venv/bin/tunemill")])
def test_every_tunemill_command_exists_with_its_options(command: str) -> None:
    words = command.split()[1:]
    verbs = words[: 2 if words[0] in {"store", "recipe"} else 1]
    shown = subprocess.run(
        [*cli_command(), *verbs, "--help"], capture_output=True, text=True, check=True
    ).stdout
    for option in (word for word in words if word.startswith("--")):
        assert option in shown


def cli_command() -> list[str]:
    return [sys.executable, "-m", cli.__name__]


@pytest.mark.parametrize("link", re.findall(r"\]\((docs/[^)]+)\)", README))
def test_every_linked_page_is_there(link: str) -> None:
    assert (ROOT / link).is_file()


def test_make_alone_lists_every_documented_target() -> None:
    shown = subprocess.run(["make", "-C", ROOT, "help"], capture_output=True, text=True, check=True).stdout
    documented = re.findall(r"^([a-z0-9-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(documented) >= 20
    for name in documented:
        assert re.search(rf"^  {name} ", shown, re.MULTILINE), name

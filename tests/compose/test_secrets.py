"""The bundled server's keys: made once, random, for their owner alone."""

from __future__ import annotations

import configparser
import subprocess
from pathlib import Path

from .conftest import ROOT, Lab


def keys(folder: Path) -> tuple[str, str]:
    parser = configparser.ConfigParser()
    parser.read(folder / "credentials")
    return parser["default"]["aws_access_key_id"], parser["default"]["aws_secret_access_key"]


def test_only_their_owner_may_read_them_and_nothing_prints_them(lab: Lab) -> None:
    done = lab.run("secrets.sh")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    folder = lab.folder / "secrets"
    assert [path.name for path in folder.iterdir()] == ["credentials"]
    assert oct(folder.stat().st_mode & 0o777) == "0o700"
    assert oct((folder / "credentials").stat().st_mode & 0o777) == "0o600"
    access, secret = keys(folder)
    assert (len(access), len(secret)) == (20, 40)


def test_they_differ_each_time(lab: Lab, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert lab.run("secrets.sh", str(tmp_path / name)).returncode == 0
    assert not set(keys(tmp_path / "one")) & set(keys(tmp_path / "two"))


def test_they_are_never_replaced_and_an_open_mode_is_closed(lab: Lab) -> None:
    lab.run("secrets.sh")
    path = lab.folder / "secrets/credentials"
    before = path.read_bytes()
    path.chmod(0o644)
    path.parent.chmod(0o755)
    assert lab.run("secrets.sh").returncode == 0
    assert path.read_bytes() == before
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_two_at_once_agree_on_one_pair(lab: Lab) -> None:
    for _ in range(10):
        started = [subprocess.Popen(lab.command("secrets.sh")) for _ in range(4)]
        assert [process.wait(30) for process in started] == [0] * 4
        (path,) = (lab.folder / "secrets").iterdir()
        assert len(path.read_text().splitlines()) == 3
        path.unlink()


def test_git_never_sees_them() -> None:
    ignored = subprocess.run(
        ["git", "check-ignore", "-q", "compose/secrets/credentials"], cwd=ROOT, check=False
    )
    assert ignored.returncode == 0
    tracked = subprocess.run(
        ["git", "ls-files", "compose/secrets"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert tracked.stdout == ""

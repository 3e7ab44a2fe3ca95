"""Local writes are whole or absent, and a full disk is one clear error."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from tunemill.errors import TransientError
from tunemill.files import CHUNK, atomic_write, disk_errors, need_space, sha256_file, write_json, write_text


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.bin"
    with atomic_write(path) as target:
        target.write(b"half")
        assert not path.exists()
        target.write(b" whole")
    assert path.read_bytes() == b"half whole"
    assert path.stat().st_mode & 0o777 == 0o644


def test_an_error_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def fail() -> None:
        with atomic_write(path) as target:
            target.write(b"new")
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        fail()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_hash_equals_hashlib_across_chunks(tmp_path: Path) -> None:
    data = bytes(range(256)) * (CHUNK // 256) * 2 + b"tail"
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_json_is_sorted_and_keeps_letters(tmp_path: Path) -> None:
    write_json(tmp_path / "value.json", {"b": 1, "a": "é"})
    assert (tmp_path / "value.json").read_text() == '{\n  "a": "é",\n  "b": 1\n}\n'


def test_a_really_full_disk_is_a_transient_error() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")

    def fill() -> None:
        with disk_errors(full), full.open("wb") as target:
            target.write(b"x" * 100_000)

    with pytest.raises(TransientError, match="no space left for /dev/full"):
        fill()


def test_other_disk_errors_keep_their_kind() -> None:
    def deny() -> None:
        with disk_errors(Path("file")):
            raise OSError(errno.EACCES, "denied")

    with pytest.raises(PermissionError):
        deny()


def test_space_is_asked_for_before_the_work(tmp_path: Path) -> None:
    need_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(TransientError, match="free some space"):
        need_space(tmp_path / "not" / "yet", 1 << 62)

"""What is special about a directory: rights, a root that vanishes, temporary files, locks."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunemill.errors import ConfigurationError, TransientError
from tunemill.store.local import LocalBackend

DATA = b"x" * 1000
SHA = hashlib.sha256(DATA).digest()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def local(root: Path) -> LocalBackend:
    return LocalBackend.create(root)


def test_objects_are_read_only_and_nothing_temporary_is_left(local: LocalBackend, root: Path) -> None:
    local.put_if_absent("tags/base/tiny/v1", b"x")
    local.put_if_absent("tags/base/tiny/v1", b"y")
    local.now()
    assert (root / "tags/base/tiny/v1").stat().st_mode & 0o777 == 0o444
    assert list((root / ".tmp").iterdir()) == []


def test_what_a_kill_left_is_listed_and_removed(local: LocalBackend, root: Path) -> None:
    (root / ".tmp").mkdir()
    (root / ".tmp" / "put-0123").write_bytes(b"half")
    (found,) = local.unfinished()
    assert found.key == ""
    local.abort(found)
    assert list(local.unfinished()) == []


def test_a_store_that_vanishes_is_not_made_anew(local: LocalBackend, root: Path) -> None:
    root.rmdir()
    with pytest.raises(ConfigurationError, match="there is no store at"):
        local.put_if_absent("tags/base/tiny/v1", b"x")
    assert not root.exists()


def test_an_upload_at_work_is_not_taken_over(local: LocalBackend) -> None:
    first = local.upload("blobs/sha256/aa", len(DATA), len(DATA))
    first.send(1, DATA, SHA)
    second = local.upload("blobs/sha256/aa", len(DATA), len(DATA))
    assert not second.holds(1, DATA, SHA)
    second.send(1, DATA, SHA)
    assert first.complete()
    assert not second.complete()
    assert local.get("blobs/sha256/aa") == DATA
    assert list(local.unfinished()) == []


def test_an_upload_that_became_an_object_is_never_written_again(local: LocalBackend, root: Path) -> None:
    """As after a kill between giving the file its name and removing the old one."""
    first = local.upload("blobs/sha256/aa", len(DATA), len(DATA))
    first.send(1, DATA, SHA)
    first.close()
    (root / "blobs/sha256").mkdir(parents=True)
    (temporary,) = (root / ".tmp").iterdir()
    os.link(temporary, root / "blobs/sha256/aa")
    second = local.upload("blobs/sha256/aa", len(DATA), len(DATA))
    other = b"y" * len(DATA)
    second.send(1, other, hashlib.sha256(other).digest())
    second.close()
    assert local.get("blobs/sha256/aa") == DATA


def test_a_file_that_may_not_grow_is_a_full_disk(local: LocalBackend, root: Path) -> None:
    """A limit on file size stands in for a quota; the error and what is left are the same."""
    script = (
        "import resource, sys; from tunemill.store.local import LocalBackend; from pathlib import Path;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000));"
        "LocalBackend(Path(sys.argv[1])).put_if_absent('blobs/sha256/aa', b'x' * 10000)"
    )
    ended = subprocess.run([sys.executable, "-c", script, root], capture_output=True, text=True, check=False)
    assert "TransientError: no space left for" in ended.stderr
    assert local.head("blobs/sha256/aa") is None
    assert list((root / ".tmp").iterdir()) == []


@pytest.mark.skipif(os.getuid() == 0 and not Path("/usr/bin/setpriv").exists(), reason="root may do anything")
def test_a_directory_without_rights_is_denied(local: LocalBackend, root: Path) -> None:
    root.chmod(0o555)
    script = (
        "import os, sys; from tunemill.store.local import LocalBackend; from pathlib import Path;"
        "os.getuid() or os.setuid(65534);"
        "LocalBackend(Path(sys.argv[1])).put_if_absent('blobs/sha256/aa', b'x')"
    )
    for parent in root.parents:
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    ended = subprocess.run([sys.executable, "-c", script, root], capture_output=True, text=True, check=False)
    root.chmod(0o755)
    assert "DeniedError: the store does not let this user" in ended.stderr


def test_a_part_cut_off_by_a_kill_is_not_held(local: LocalBackend, root: Path) -> None:
    first = local.upload("blobs/sha256/aa", len(DATA), len(DATA))
    first.close()
    (temporary,) = (root / ".tmp").iterdir()
    temporary.write_bytes(DATA[:500] + bytes(500))
    second = local.upload("blobs/sha256/aa", len(DATA), len(DATA))
    assert not second.holds(1, DATA, SHA)
    with pytest.raises(TransientError, match="never arrived"):
        second.complete()
    second.close()

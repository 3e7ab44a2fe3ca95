"""Pulling: whole or not at all, from a cache that holds nothing but verified bytes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from backends import MakeDraft
from tunemill.errors import BadDataError, ConflictError, IntegrityError, TransientError, UsageError
from tunemill.progress import Progress
from tunemill.store import Artifact, File, Store
from tunemill.store.backend import Transfer
from tunemill.store.local import LocalBackend
from tunemill.store.partial import open_partial
from tunemill.store.pull import cache_directory

FILES = {"model.safetensors": os.urandom(300_000), "sub/config.json": b"{}", "README.md": b""}


@pytest.fixture
def artifact(store: Store, make_draft: MakeDraft, progress: Progress) -> Artifact:
    return store.publish(make_draft(FILES), progress)


@pytest.fixture
def local(directory_store: Store, make_draft: MakeDraft, progress: Progress) -> Artifact:
    return directory_store.publish(make_draft(FILES), progress)


def blob_path(store: Store, path: str) -> Path:
    assert isinstance(store.backend, LocalBackend)
    return store.backend.root / "blobs/sha256" / hashlib.sha256(FILES[path]).hexdigest()


def cached(tmp_path: Path, path: str) -> Path:
    return tmp_path / "cache/blobs/sha256" / hashlib.sha256(FILES[path]).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_what_was_published_is_pulled(
    store: Store, artifact: Artifact, tmp_path: Path, progress: Progress
) -> None:
    target = tmp_path / "deep" / "in"
    store.pull(artifact, target, progress)
    assert contents(target) == FILES
    assert [path.name for path in target.parent.iterdir()] == ["in"]


def test_files_are_read_only_and_shared(
    directory_store: Store, local: Artifact, tmp_path: Path, progress: Progress
) -> None:
    for name in ("one", "two"):
        directory_store.pull(local, tmp_path / name, progress)
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.stat().st_mode & 0o777 == 0o444
    assert one.stat().st_ino == two.stat().st_ino


def test_the_second_pull_asks_the_store_for_nothing(
    directory_store: Store, local: Artifact, tmp_path: Path, progress: Progress
) -> None:
    directory_store.pull(local, tmp_path / "one", progress)
    assert isinstance(directory_store.backend, LocalBackend)
    shutil.rmtree(directory_store.backend.root)
    directory_store.pull(local, tmp_path / "two", progress)
    assert contents(tmp_path / "two") == FILES


def test_an_existing_destination_is_left_alone(
    directory_store: Store, local: Artifact, tmp_path: Path, progress: Progress
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        directory_store.pull(local, tmp_path / "out", progress)
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    with pytest.raises(UsageError, match="exists already"):
        directory_store.pull(local, tmp_path / "link", progress)


class TestDamage:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            pytest.param(lambda path: path.unlink(), "is missing", id="missing"),
            pytest.param(lambda path: os.truncate(path, 100), "has 100 bytes instead of 300000", id="cut"),
            pytest.param(lambda path: path.write_bytes(b"x" * 300_000), "has other bytes", id="changed"),
        ],
    )
    def test_a_damaged_blob_reaches_nobody(
        self,
        directory_store: Store,
        local: Artifact,
        tmp_path: Path,
        progress: Progress,
        change: object,
        reason: str,
    ) -> None:
        path = blob_path(directory_store, "model.safetensors")
        path.chmod(0o644)
        change(path)  # type: ignore[operator]
        with pytest.raises(IntegrityError, match=reason) as caught:
            directory_store.pull(local, tmp_path / "out", progress)
        assert caught.value.exit_code == 65
        assert "model.safetensors" in str(caught.value)
        assert not (tmp_path / "out").exists()
        assert not cached(tmp_path, "model.safetensors").exists()

    def test_a_cached_file_that_was_written_to_is_fetched_again(
        self, directory_store: Store, local: Artifact, tmp_path: Path, progress: Progress
    ) -> None:
        directory_store.pull(local, tmp_path / "one", progress)
        path = cached(tmp_path, "model.safetensors")
        path.chmod(0o644)
        path.write_bytes(b"y" * 300_000)
        directory_store.pull(local, tmp_path / "two", progress)
        assert contents(tmp_path / "two") == FILES

    def test_a_touched_but_unchanged_file_is_kept(
        self, directory_store: Store, local: Artifact, tmp_path: Path, progress: Progress
    ) -> None:
        directory_store.pull(local, tmp_path / "one", progress)
        path = cached(tmp_path, "model.safetensors")
        before = path.stat().st_ino
        path.touch()
        directory_store.pull(local, tmp_path / "two", progress)
        assert path.stat().st_ino == before

    def test_a_record_that_promises_too_much_is_found_out(
        self, directory_store: Store, local: Artifact, tmp_path: Path, progress: Progress
    ) -> None:
        """As after a power cut: the record reached the disk and the bytes did not."""
        partial = tmp_path / "cache/.partial" / hashlib.sha256(FILES["model.safetensors"]).hexdigest()
        partial.parent.mkdir(parents=True)
        partial.write_bytes(bytes(300_000))
        partial.with_name(partial.name + ".done").write_text(f"{directory_store.transfer.part} 0\n")
        directory_store.pull(local, tmp_path / "out", progress)
        assert contents(tmp_path / "out") == FILES

    @pytest.mark.parametrize("path", ["../escaped", "/tmp/escaped", "a/../../escaped", "x.pkl"])
    def test_a_hostile_path_is_refused_before_anything_is_written(
        self, directory_store: Store, local: Artifact, tmp_path: Path, progress: Progress, path: str
    ) -> None:
        hostile = Artifact(
            **{**vars(local), "files": (File(path, local.files[0].digest, local.files[0].size),)}
        )
        with pytest.raises(BadDataError, match="is refused"):
            directory_store.pull(hostile, tmp_path / "out", progress)
        assert not (tmp_path / "cache").exists()
        assert not (tmp_path / "out").exists()


class TestSpace:
    def test_too_small_a_disk_is_told_before_anything_travels(
        self, directory_store: Store, local: Artifact, tmp_path: Path, progress: Progress
    ) -> None:
        huge = Artifact(**{**vars(local), "files": (File("a.gguf", "0" * 64, 1 << 60),)})
        with pytest.raises(TransientError, match="free some space"):
            directory_store.pull(huge, tmp_path / "out", progress)
        assert not (tmp_path / "cache").exists()

    def test_a_disk_that_fills_up_on_the_way(
        self, directory_store: Store, local: Artifact, tmp_path: Path
    ) -> None:
        """In a mount namespace of its own, a tmpfs of 200 kB holds the cache; the check is outrun."""
        if not sys.platform.startswith("linux") or shutil.which("unshare") is None:
            pytest.skip("needs Linux namespaces for a small file system")
        small = tmp_path / "small"
        small.mkdir()
        script = (
            "import sys; from pathlib import Path; from tunemill.store import open_store;"
            "from tunemill.store import pull; from tunemill.progress import Progress;"
            "pull.need_space = lambda *_: None;"  # another process takes the space after the check
            "s = open_store(sys.argv[1]); s._cache = Path(sys.argv[2]) / 'cache';"
            "s.pull(s.resolve(sys.argv[3]), Path(sys.argv[4]), Progress(quiet=True))"
        )
        mount = f'mount -t tmpfs -o size=200k none {small} && exec "$@"'
        python = [
            sys.executable,
            "-c",
            script,
            directory_store.url,
            str(small),
            local.name,
            str(tmp_path / "o"),
        ]
        ended = subprocess.run(
            ["unshare", "-rm", "sh", "-c", mount, "sh", *python], capture_output=True, text=True, check=False
        )
        if "tunemill" not in ended.stderr:
            pytest.skip(f"this system allows no mount namespace: {ended.stderr.strip()[:100]}")
        assert "TransientError: no space left for" in ended.stderr
        assert not (tmp_path / "o").exists()


class TestOtherProcesses:
    def test_a_pull_into_the_same_place_is_a_conflict(
        self, directory_store: Store, local: Artifact, tmp_path: Path, progress: Progress
    ) -> None:
        temporary = tmp_path / ".out.partial"
        temporary.mkdir()
        descriptor = os.open(temporary, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(ConflictError, match="another process is pulling"):
            directory_store.pull(local, tmp_path / "out", progress)
        os.close(descriptor)
        directory_store.pull(local, tmp_path / "out", progress)
        assert not temporary.exists()

    def test_a_blob_another_process_fetches_is_waited_for(
        self, directory_store: Store, local: Artifact, tmp_path: Path, progress: Progress
    ) -> None:
        folder = tmp_path / "cache/.partial"
        folder.mkdir(parents=True)
        file = next(file for file in local.files if file.path == "model.safetensors")
        pulled = threading.Thread(target=directory_store.pull, args=(local, tmp_path / "out", progress))
        with open_partial(folder, file, directory_store.transfer.part):
            pulled.start()
            pulled.join(0.3)
            assert pulled.is_alive()
        pulled.join(10)
        assert contents(tmp_path / "out") == FILES

    def test_eight_pulls_share_one_cache(
        self, directory_store: Store, local: Artifact, tmp_path: Path, progress: Progress
    ) -> None:
        directory_store.transfer = Transfer(part=10_000, workers=2)
        threads = [
            threading.Thread(target=directory_store.pull, args=(local, tmp_path / f"out-{n}", progress))
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert all(contents(tmp_path / f"out-{n}") == FILES for n in range(8))
        assert list((tmp_path / "cache/.partial").iterdir()) == []


def test_where_links_cross_devices_files_are_copied(
    directory_store: Store, local: Artifact, tmp_path: Path, progress: Progress
) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    target = other / f"tunemill-test-{os.getpid()}"
    try:
        directory_store.pull(local, target, progress)
        assert contents(target) == FILES
        assert (target / "model.safetensors").stat().st_mode & 0o777 == 0o444
    finally:
        shutil.rmtree(target, ignore_errors=True)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TUNEMILL_CACHE", str(tmp_path / "here"))
    assert cache_directory() == tmp_path / "here"
    monkeypatch.delenv("TUNEMILL_CACHE")
    assert cache_directory().name == "tunemill"

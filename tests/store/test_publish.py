"""Publishing: what is stored, what is not sent twice, what is refused, and what memory it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backends import SMALL, MakeDraft
from tunemill.errors import BadDataError, ConflictError, IntegrityError, TransientError, UsageError
from tunemill.progress import Progress
from tunemill.store import Store, keys
from tunemill.store import publish as publish_module
from tunemill.store.backend import Backend, Upload
from tunemill.store.publish import prepare, upload_package

PART = SMALL.part


class Counted:
    """How many parts and small objects a backend was sent."""

    def __init__(self, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts: list[int] = []
        self.blobs: list[str] = []
        put, begin = backend.put_if_absent, backend.upload

        def counted_put(key: str, data: bytes) -> bool:
            if key.startswith(keys.BLOBS):
                self.blobs.append(key)
            return put(key, data)

        def counted_upload(*arguments: Any) -> Upload:
            upload = begin(*arguments)
            send = upload.send

            def counted_send(number: int, data: bytes, sha256: bytes) -> None:
                self.parts.append(number)
                send(number, data, sha256)

            monkeypatch.setattr(upload, "send", counted_send)
            return upload

        monkeypatch.setattr(backend, "put_if_absent", counted_put)
        monkeypatch.setattr(backend, "upload", counted_upload)


def test_what_is_there_already_is_not_sent(
    store: Store, make_draft: MakeDraft, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"model.safetensors": os.urandom(PART + 9), "config.json": b"{}", "copy/config.json": b"{}"}
    first = store.publish(make_draft(files), progress)
    counted = Counted(store.backend, monkeypatch)
    second = store.publish(make_draft(files, facts={"other": 1}), progress)
    assert counted.parts == []
    assert len(counted.blobs) <= 2, "statement and configuration, which differ"
    assert first.content == second.content
    assert first.digest != second.digest
    assert store.resolve("tiny-stdlib/adapter") == second


def test_an_interrupted_upload_goes_on(
    store: Store, make_draft: MakeDraft, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = make_draft({"model.safetensors": os.urandom(3 * PART + 9)})
    package = prepare(draft, store.transfer, progress)
    source = package.sources[0]
    upload = store.backend.upload(keys.blob(source.file.digest), source.file.size, PART)
    data = source.path.read_bytes()
    for number in (1, 3):
        upload.send(number, data[(number - 1) * PART : number * PART], source.parts[number - 1])
    upload.close()
    counted = Counted(store.backend, monkeypatch)
    store.publish(draft, progress)
    assert sorted(counted.parts) == [2, 4]
    assert list(store.backend.unfinished()) == []


def test_nothing_is_left_but_the_artifact(store: Store, make_draft: MakeDraft, progress: Progress) -> None:
    artifact = store.publish(make_draft({"a.json": b"1", "b/c.json": b"2"}, tags=("v1", "v2")), progress)
    stored = [entry.key for prefix in ("leases/", "tags/", "branches/", "manifests/", "blobs/")
              for entry in store.backend.list(prefix)]  # fmt: skip
    manifest = store.manifest(artifact)
    assert sorted(stored) == sorted(
        [
            keys.tag(artifact.name, "v1"),
            keys.tag(artifact.name, "v2"),
            keys.branch(artifact.name, 1),
            keys.manifest(artifact.digest.removeprefix("sha256:")),
            *(keys.blob(blob.hex) for blob in manifest.blobs),
        ]
    )


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 2 * PART], ids=lambda size: f"{size} B")
def test_every_size_around_a_part_arrives(
    directory_store: Store, make_draft: MakeDraft, progress: Progress, tmp_path: Path, size: int
) -> None:
    data = os.urandom(size)
    artifact = directory_store.publish(make_draft({"x.safetensors": data}), progress)
    directory_store.pull(artifact, tmp_path / "out", progress)
    assert (tmp_path / "out" / "x.safetensors").read_bytes() == data


class TestRefusals:
    @pytest.mark.parametrize("path", ["model.bin", "optimizer.pt", "a b.json", "x.zip"])
    def test_paths_that_may_not_be_stored(
        self, directory_store: Store, make_draft: MakeDraft, progress: Progress, path: str
    ) -> None:
        with pytest.raises(BadDataError, match="is refused"):
            directory_store.publish(make_draft({path: b"x"}), progress)
        assert list(directory_store.backend.list(keys.LEASES)) == []

    def test_links_are_refused(
        self, directory_store: Store, make_draft: MakeDraft, progress: Progress, tmp_path: Path
    ) -> None:
        draft = make_draft({"a.json": b"1"})
        (draft.directory / "b.json").symlink_to(tmp_path)
        with pytest.raises(BadDataError, match=r"'b\.json' .* is a link"):
            directory_store.publish(draft, progress)

    def test_a_file_too_large_for_bounded_memory(
        self, directory_store: Store, make_draft: MakeDraft, progress: Progress
    ) -> None:
        draft = make_draft({"x.gguf": b""})
        os.truncate(draft.directory / "x.gguf", (1 << 39) + 1)  # sparse: takes no space
        with pytest.raises(BadDataError, match="split it into shards"):
            directory_store.publish(draft, progress)

    def test_a_pipe_is_refused(
        self, directory_store: Store, make_draft: MakeDraft, progress: Progress
    ) -> None:
        draft = make_draft({"a.json": b"1"})
        os.mkfifo(draft.directory / "b.json")
        with pytest.raises(BadDataError, match="no regular file"):
            directory_store.publish(draft, progress)

    def test_provenance_has_its_path_to_itself(
        self, directory_store: Store, make_draft: MakeDraft, progress: Progress
    ) -> None:
        with pytest.raises(BadDataError, match="differ in nothing but case"):
            directory_store.publish(make_draft({"Provenance.intoto.json": b"x"}), progress)

    def test_no_files(self, directory_store: Store, make_draft: MakeDraft, progress: Progress) -> None:
        with pytest.raises(BadDataError, match="nothing to publish"):
            directory_store.publish(make_draft({}), progress)

    def test_no_folder(self, directory_store: Store, make_draft: MakeDraft, progress: Progress) -> None:
        draft = make_draft({})
        draft.directory.rmdir()
        with pytest.raises(BadDataError, match="there is no directory"):
            directory_store.publish(draft, progress)

    @pytest.mark.parametrize("options", [{"name": "Tiny/Adapter"}, {"tags": ("V 1",)}])
    def test_names(
        self, directory_store: Store, make_draft: MakeDraft, progress: Progress, options: dict[str, Any]
    ) -> None:
        with pytest.raises(UsageError):
            directory_store.publish(make_draft({"a.json": b"1"}, **options), progress)

    @pytest.mark.parametrize("size", [10, PART + 10], ids=["small", "large"])
    def test_a_file_that_changes_meanwhile(
        self, directory_store: Store, make_draft: MakeDraft, progress: Progress, size: int
    ) -> None:
        draft = make_draft({"x.safetensors": b"a" * size})
        package = prepare(draft, directory_store.transfer, progress)
        (draft.directory / "x.safetensors").write_bytes(b"b" * size)
        with pytest.raises(BadDataError, match="changed while it was being published"):
            upload_package(directory_store.backend, package, directory_store.transfer, progress)
        assert directory_store.backend.head(keys.blob(package.sources[0].file.digest)) is None

    def test_a_blob_of_the_wrong_size_is_damage(
        self, directory_store: Store, make_draft: MakeDraft, progress: Progress
    ) -> None:
        draft = make_draft({"a.json": b"12345"})
        package = prepare(draft, directory_store.transfer, progress)
        directory_store.backend.put_if_absent(keys.blob(package.sources[0].file.digest), b"1")
        with pytest.raises(IntegrityError, match="has 1 bytes instead of 5"):
            directory_store.publish(draft, progress)


class TestTags:
    def test_the_same_content_again_gives_the_first_artifact(
        self, store: Store, make_draft: MakeDraft, progress: Progress
    ) -> None:
        first = store.publish(make_draft({"a.json": b"1"}, tags=("action-1",)), progress)
        again = store.publish(make_draft({"a.json": b"1"}, tags=("action-1", "v1"), facts={}), progress)
        assert again == first
        assert store.resolve(first.name + ":v1") == first
        assert len(store.history(first.name)) == 1

    def test_other_content_is_a_conflict_and_moves_no_branch(
        self, store: Store, make_draft: MakeDraft, progress: Progress
    ) -> None:
        first = store.publish(make_draft({"a.json": b"1"}, tags=("v1",)), progress)
        with pytest.raises(ConflictError, match="a tag never changes") as caught:
            store.publish(make_draft({"a.json": b"2"}, tags=("v1",)), progress)
        assert caught.value.exit_code == 75
        assert store.resolve(first.name) == first
        assert list(store.backend.list(keys.LEASES)) == []

    def test_without_tags_each_publish_is_a_step(
        self, store: Store, make_draft: MakeDraft, progress: Progress
    ) -> None:
        published = [store.publish(make_draft({"a.json": b"%d" % n}), progress) for n in range(3)]
        steps = store.history(published[0].name)
        assert [step.digest for step in steps] == [artifact.digest for artifact in reversed(published)]
        assert [step.sequence for step in steps] == [3, 2, 1]
        assert steps[0].previous == published[1].digest


def test_a_lease_stays_when_the_network_fails(
    directory_store: Store, make_draft: MakeDraft, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It protects what was sent until the rerun, which sends only the rest."""

    def fail(*_: object) -> None:
        raise TransientError("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(publish_module, "check_lease", fail)
        with pytest.raises(TransientError, match="gone"):
            directory_store.publish(make_draft({"a.json": b"1"}), progress)
    assert len(list(directory_store.backend.list(keys.LEASES))) == 1
    assert directory_store.find("tiny-stdlib/adapter") is None


MEMORY = """
import resource, sys
from pathlib import Path
from tunemill.progress import Progress
from tunemill.store import Draft, Provenance, Store
from tunemill.store.publish import prepare
from datetime import UTC, datetime
sys.path.insert(0, sys.argv[4])
from killed import open_backend
now = datetime(2026, 1, 1, tzinfo=UTC)
made = Provenance("bench", "0", {}, {}, {}, {}, "0", None, None, now, now)
folder = Path(sys.argv[2])
folder.mkdir()
with (folder / "model.safetensors").open("wb") as large:
    for number in range(64):
        large.seek(number << 24)
        large.write(bytes([number]))
    large.truncate(1 << 30)
store = Store(open_backend(sys.argv[1]), cache=Path(sys.argv[3]) / "cache")
artifact = store.publish(Draft("big/base", "base", folder, {}, made), Progress(quiet=True))
store.pull(artifact, Path(sys.argv[3]) / "out", Progress(quiet=True))
status = Path("/proc/self/status")
if status.exists():  # ru_maxrss would count the test's own process, which this one was forked from
    peak = int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak)
"""


@pytest.mark.slow
def test_a_gibibyte_takes_at_most_256_megabytes(
    backend: Backend, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if "moto" in request.node.callspec.id:
        pytest.skip("moto would keep the gibibyte in this process's memory")
    faults = Path(__file__).parents[1] / "faults"
    url = backend.url.removeprefix("file://")
    command = [sys.executable, "-c", MEMORY, url, tmp_path / "draft", tmp_path, faults]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 256_000_000

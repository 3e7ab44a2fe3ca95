"""The contract of every backend: one class, run against a directory, moto's server and a real server."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from tunemill.errors import IntegrityError, TransientError
from tunemill.store.backend import Backend, Transfer, Unfinished

PART = 5 << 20


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@pytest.fixture
def parts() -> list[bytes]:
    return [bytes([number]) * PART for number in (1, 2)] + [b"the end"]


def size_of(parts: list[bytes]) -> int:
    return sum(len(part) for part in parts)


def collect(pieces: Iterator[bytes]) -> bytes:
    return b"".join(pieces)


class TestSmallObjects:
    def test_what_was_created_is_read_back(self, backend: Backend) -> None:
        assert backend.put_if_absent("tags/base/tiny/v1", b"first")
        assert backend.get("tags/base/tiny/v1") == b"first"

    def test_create_only_never_replaces(self, backend: Backend) -> None:
        assert backend.put_if_absent("tags/base/tiny/v1", b"first")
        assert not backend.put_if_absent("tags/base/tiny/v1", b"second")
        assert backend.get("tags/base/tiny/v1") == b"first"

    def test_an_absent_object_is_none(self, backend: Backend) -> None:
        assert backend.get("tags/base/tiny/v1") is None
        assert backend.head("tags/base/tiny/v1") is None

    def test_an_empty_object_is_an_object(self, backend: Backend) -> None:
        assert backend.put_if_absent("blobs/sha256/e3", b"")
        assert backend.get("blobs/sha256/e3") == b""
        entry = backend.head("blobs/sha256/e3")
        assert entry is not None
        assert collect(backend.read(entry, 0, 0)) == b""

    def test_a_read_is_bounded(self, backend: Backend) -> None:
        backend.put_if_absent("leases/a", b"x" * 100)
        assert backend.get("leases/a", 100) == b"x" * 100
        with pytest.raises(IntegrityError, match="larger than the 99 bytes"):
            backend.get("leases/a", 99)

    def test_head_tells_size_age_and_etag(self, backend: Backend) -> None:
        before = backend.now()
        backend.put_if_absent("leases/a", b"12345")
        entry = backend.head("leases/a")
        assert entry is not None
        assert (entry.key, entry.size) == ("leases/a", 5)
        assert timedelta(seconds=-2) <= entry.modified - before <= timedelta(seconds=10)

    def test_the_clock_has_a_zone_and_is_about_right(self, backend: Backend) -> None:
        assert abs(backend.now() - datetime.now(UTC)) < timedelta(seconds=10)

    def test_deleting_twice_is_no_error(self, backend: Backend) -> None:
        backend.put_if_absent("leases/a", b"x")
        backend.delete("leases/a")
        backend.delete("leases/a")
        assert backend.get("leases/a") is None
        assert backend.put_if_absent("leases/a", b"again")

    def test_of_eight_creators_one_wins(self, backend: Backend) -> None:
        with ThreadPoolExecutor(8) as writers:
            for number in range(5):
                key = f"tags/base/tiny/{number}"
                won = list(
                    writers.map(lambda who, key=key: backend.put_if_absent(key, b"%d" % who), range(8))
                )
                assert won.count(True) == 1
                assert backend.get(key) == b"%d" % won.index(True)


class TestListing:
    KEYS = ("branches/a-b/x/1", "branches/a/x/2", "branches/a/x/1", "branches/a/x-y/1", "branches/a.b/x/1")

    def test_the_order_is_that_of_whole_keys(self, backend: Backend) -> None:
        for key in self.KEYS:
            backend.put_if_absent(key, b"x")
        assert [entry.key for entry in backend.list("branches/")] == sorted(self.KEYS)
        assert [entry.key for entry in backend.list("branches/a/x/")] == ["branches/a/x/1", "branches/a/x/2"]

    def test_folders_are_the_next_segments(self, backend: Backend) -> None:
        for key in self.KEYS:
            backend.put_if_absent(key, b"x")
        assert sorted(backend.folders("branches/")) == ["a", "a-b", "a.b"]
        assert sorted(backend.folders("branches/a/")) == ["x", "x-y"]

    def test_what_was_emptied_is_no_folder(self, backend: Backend) -> None:
        backend.put_if_absent("branches/a/x/1", b"x")
        backend.delete("branches/a/x/1")
        assert list(backend.folders("branches/")) == []

    def test_nothing_there_lists_as_nothing(self, backend: Backend) -> None:
        assert list(backend.list("tags/")) == []
        assert list(backend.folders("tags/")) == []

    def test_a_listed_entry_is_that_of_head(self, backend: Backend) -> None:
        backend.put_if_absent("leases/a", b"12345")
        listed = next(backend.list("leases/"))
        assert listed == backend.head("leases/a")


class TestRanges:
    def test_any_range_can_be_read(self, backend: Backend) -> None:
        data = os.urandom(3_000_000)
        backend.put_if_absent("blobs/sha256/aa", data)
        entry = backend.head("blobs/sha256/aa")
        assert entry is not None
        for offset, length in ((0, 1), (0, len(data)), (2_999_999, 1), (1_234_567, 1_500_000)):
            pieces = list(backend.read(entry, offset, length))
            assert b"".join(pieces) == data[offset : offset + length]
            assert max(len(piece) for piece in pieces) <= 1 << 20

    def test_a_replaced_object_is_not_mixed_in(self, backend: Backend) -> None:
        backend.put_if_absent("blobs/sha256/aa", b"first")
        entry = backend.head("blobs/sha256/aa")
        assert entry is not None
        backend.delete("blobs/sha256/aa")
        backend.put_if_absent("blobs/sha256/aa", b"other")
        with pytest.raises(TransientError, match="run it again"):
            collect(backend.read(entry, 0, 5))


class TestUploads:
    def test_parts_become_one_object_on_completion(self, backend: Backend, parts: list[bytes]) -> None:
        upload = backend.upload("blobs/sha256/aa", size_of(parts), PART)
        for number in (3, 1, 2):  # any order
            upload.send(number, parts[number - 1], sha(parts[number - 1]))
        assert backend.head("blobs/sha256/aa") is None
        assert list(backend.list("blobs/sha256/")) == []
        assert upload.complete()
        upload.close()
        entry = backend.head("blobs/sha256/aa")
        assert entry is not None
        assert collect(backend.read(entry, 0, size_of(parts))) == b"".join(parts)
        assert list(backend.unfinished()) == []

    def test_a_second_attempt_finds_the_parts_sent(self, backend: Backend, parts: list[bytes]) -> None:
        first = backend.upload("blobs/sha256/aa", size_of(parts), PART)
        first.send(1, parts[0], sha(parts[0]))
        first.close()
        second = backend.upload("blobs/sha256/aa", size_of(parts), PART)
        assert second.holds(1, parts[0], sha(parts[0]))
        assert not second.holds(2, parts[1], sha(parts[1]))
        for number in (2, 3):
            second.send(number, parts[number - 1], sha(parts[number - 1]))
        assert second.complete()
        second.close()
        assert list(backend.unfinished()) == []

    def test_a_part_with_other_bytes_is_not_held(self, backend: Backend, parts: list[bytes]) -> None:
        first = backend.upload("blobs/sha256/aa", size_of(parts), PART)
        first.send(1, parts[1], sha(parts[1]))
        first.close()
        second = backend.upload("blobs/sha256/aa", size_of(parts), PART)
        assert not second.holds(1, parts[0], sha(parts[0]))
        for number in (1, 2, 3):
            second.send(number, parts[number - 1], sha(parts[number - 1]))
        assert second.complete()
        entry = backend.head("blobs/sha256/aa")
        assert entry is not None
        assert collect(backend.read(entry, 0, PART)) == parts[0]

    def test_a_missing_part_cannot_be_completed(self, backend: Backend, parts: list[bytes]) -> None:
        upload = backend.upload("blobs/sha256/aa", size_of(parts), PART)
        upload.send(1, parts[0], sha(parts[0]))
        with pytest.raises(TransientError, match=r"2 parts .* never arrived"):
            upload.complete()
        upload.close()
        assert backend.head("blobs/sha256/aa") is None

    def test_completing_never_replaces(self, backend: Backend, parts: list[bytes]) -> None:
        upload = backend.upload("blobs/sha256/aa", size_of(parts), PART)
        for number, part in enumerate(parts, 1):
            upload.send(number, part, sha(part))
        backend.put_if_absent("blobs/sha256/aa", b"first")
        assert not upload.complete()
        upload.close()
        assert backend.get("blobs/sha256/aa") == b"first"
        assert list(backend.unfinished()) == []

    def test_wrong_bytes_are_refused(
        self, backend: Backend, parts: list[bytes], request: pytest.FixtureRequest
    ) -> None:
        if "moto" in request.node.callspec.id:
            pytest.skip("moto checks no checksum")
        upload = backend.upload("blobs/sha256/aa", size_of(parts), PART)
        with pytest.raises(IntegrityError):
            upload.send(1, parts[0], sha(parts[1]))
        upload.close()

    def test_uploads_of_other_keys_are_left_alone(self, backend: Backend, parts: list[bytes]) -> None:
        first = backend.upload("blobs/sha256/aa", size_of(parts), PART)
        first.send(1, parts[0], sha(parts[0]))
        first.close()
        other = backend.upload("blobs/sha256/a", size_of(parts), PART)
        assert not other.holds(1, parts[0], sha(parts[0]))
        other.close()

    def test_unfinished_uploads_are_listed_and_aborted(
        self, backend: Backend, parts: list[bytes], request: pytest.FixtureRequest
    ) -> None:
        upload = backend.upload("blobs/sha256/aa", size_of(parts), PART)
        upload.send(1, parts[0], sha(parts[0]))
        upload.close()
        (found,) = backend.unfinished()
        assert found.key == "blobs/sha256/aa"
        if "moto" not in request.node.callspec.id:  # moto says that every upload began in 2010
            assert abs(found.started - backend.now()) < timedelta(seconds=20)
        backend.abort(found)
        backend.abort(found)
        assert list(backend.unfinished()) == []

    def test_aborting_what_never_was_is_no_error(self, backend: Backend) -> None:
        backend.abort(Unfinished("blobs/sha256/aa", "0123456789abcdef", datetime.now(UTC)))


@pytest.mark.parametrize(
    ("size", "part", "workers"),
    [
        pytest.param(1 << 30, 16 << 20, 4, id="1 GiB"),
        pytest.param(160_000 << 20, 16 << 20, 4, id="10,000 parts"),
        pytest.param(1 << 39, -(-(1 << 39) // 10_000), 2, id="512 GiB, the largest file"),
    ],
)
def test_parts_grow_with_the_object_and_memory_stays_bounded(size: int, part: int, workers: int) -> None:
    transfer = Transfer()
    assert transfer.part_size(size) == part
    assert -(-size // part) <= 10_000
    assert transfer.workers_for(size) == workers

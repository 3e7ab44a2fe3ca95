"""Leases and collections: each sees the other, by the server's clock, and dead ones harm nobody."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from backends import MakeDraft
from tunemill.errors import BadDataError, TransientError
from tunemill.progress import Progress
from tunemill.store import Store, keys
from tunemill.store import lease as lease_module
from tunemill.store.backend import Backend
from tunemill.store.lease import (
    COLLECTION_LIFE,
    LEASE_LIFE,
    LEASE_MARGIN,
    announce,
    check_lease,
    collections,
    drop_lease,
    leases,
    wait_for_collections,
    withdraw,
    write_lease,
)
from tunemill.store.local import LocalBackend

ONE, TWO = "1" * 64, "2" * 64


@pytest.fixture
def local(tmp_path: Path) -> LocalBackend:
    return LocalBackend.create(tmp_path / "store")


def age(backend: LocalBackend, key: str, by: timedelta) -> None:
    path = backend.root / key
    moment = path.stat().st_mtime - by.total_seconds()
    os.utime(path, (moment, moment))


def test_a_lease_names_what_it_protects_until_it_is_dropped(backend: Backend) -> None:
    lease = write_lease(backend, [TWO, ONE, ONE])
    assert list(leases(backend)) == [lease]
    assert lease.digests == {ONE, TWO}
    check_lease(backend, lease)
    drop_lease(backend, lease)
    drop_lease(backend, lease)
    assert list(leases(backend)) == []


def test_an_announcement_is_seen_until_it_is_withdrawn(backend: Backend) -> None:
    collection = announce(backend, [ONE])
    assert list(collections(backend)) == [collection]
    withdraw(backend, collection)
    assert list(collections(backend)) == []


def test_old_ones_protect_and_delay_nobody(local: LocalBackend, progress: Progress) -> None:
    lease, collection = write_lease(local, [ONE]), announce(local, [ONE])
    age(local, keys.lease(lease.identifier), LEASE_LIFE)
    age(local, keys.collection(collection.identifier), COLLECTION_LIFE)
    assert list(leases(local)) == []
    wait_for_collections(local, [ONE], progress)


def test_a_commit_needs_a_young_lease(local: LocalBackend) -> None:
    lease = write_lease(local, [ONE])
    age(local, keys.lease(lease.identifier), LEASE_LIFE - LEASE_MARGIN)
    with pytest.raises(TransientError, match="took longer than its lease"):
        check_lease(local, lease)


def test_a_commit_needs_its_lease_to_be_there(local: LocalBackend) -> None:
    lease = write_lease(local, [ONE])
    drop_lease(local, lease)
    with pytest.raises(TransientError, match="run the same command again"):
        check_lease(local, lease)


def test_a_malformed_lease_is_named(local: LocalBackend) -> None:
    local.put_if_absent(keys.lease("abc"), b"{}")
    with pytest.raises(BadDataError, match=r"leases/abc in file://.* is malformed"):
        list(leases(local))


def test_a_publish_waits_while_its_files_may_be_deleted(
    directory_store: Store, make_draft: MakeDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "POLL_SECONDS", 0.01)
    first = directory_store.publish(make_draft({"a.json": b"1"}), Progress(quiet=True))
    collection = announce(directory_store.backend, [first.files[0].digest])
    draft = make_draft({"a.json": b"1"}, name="other/adapter")
    waiting = threading.Thread(target=directory_store.publish, args=(draft, Progress(quiet=True)))
    waiting.start()
    deadline = time.monotonic() + 10
    while not list(leases(directory_store.backend)) and time.monotonic() < deadline:
        time.sleep(0.01)
    # The collector, marking again now, sees the lease; here it deletes nevertheless, as one would that
    # had marked before: the publish has not looked for the blob yet.
    directory_store.backend.delete(keys.blob(first.files[0].digest))
    assert directory_store.find("other/adapter") is None
    withdraw(directory_store.backend, collection)
    waiting.join(10)
    assert directory_store.find("other/adapter") is not None
    assert directory_store.backend.get(keys.blob(first.files[0].digest)) == b"1"


def test_a_collection_of_other_files_delays_nobody(local: LocalBackend, progress: Progress) -> None:
    announce(local, [TWO])
    wait_for_collections(local, [ONE], progress)

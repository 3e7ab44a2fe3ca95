"""Collection: what goes, what stays, and that no publish is ever hurt, on every backend."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta

import pytest

from tunemill.errors import BadDataError, DeniedError, IntegrityError, TransientError, TunemillError
from tunemill.progress import Progress
from tunemill.store import collect, keys
from tunemill.store.collect import plan, sweep
from tunemill.store.lease import announce, leases, write_lease

NOTHING = timedelta(seconds=-2)  # S3 counts ages in whole seconds: below zero everything is old enough


@pytest.fixture
def publish(store, make_draft, make_provenance, progress):
    def publish(name, data, kind="adapter", inputs=None, **options):
        made = make_provenance(inputs=inputs or {})
        draft = make_draft({"model.safetensors": data}, name=name, kind=kind, provenance=made, **options)
        return store.publish(draft, progress)

    return publish


def orphan(store, artifact):
    """Take an artifact's references away, as if its publish had been killed before its commit."""
    for prefix in (keys.BRANCHES, keys.TAGS):
        for entry in list(store.backend.list(f"{prefix}{artifact.name}/")):
            store.backend.delete(entry.key)


def everything(store):
    return {entry.key for top in ("blobs/", "manifests/") for entry in store.backend.list(top)}


def clean(store, progress, grace=NOTHING):
    return sweep(store.backend, grace, progress, settle_seconds=0)


def test_only_what_nothing_names_goes(store, publish, progress, tmp_path):
    kept = publish("run/adapter", b"kept", tags=("v1",))
    gone = publish("run/other", b"gone")
    orphan(store, gone)
    before = everything(store)
    found = plan(store.backend, NOTHING, progress)
    assert everything(store) == before, "a plan deletes nothing"
    removed = clean(store, progress)
    assert removed == found
    assert removed.size > 0
    assert before - everything(store) == {entry.key for entry in removed.objects}
    assert store.find(gone.reference) is None
    store.pull(store.resolve("run/adapter:v1"), tmp_path / "pulled", progress)
    assert store.resolve("run/adapter") == kept
    assert clean(store, progress).objects == ()


def test_shared_blobs_stay_while_one_artifact_has_them(store, publish, progress, tmp_path):
    kept = publish("run/adapter", b"shared")
    orphan(store, publish("run/other", b"shared"))
    assert clean(store, progress).objects != ()
    store.pull(kept, tmp_path / "pulled", progress)


def test_inputs_stay_while_what_was_made_from_them_does(store, publish, progress):
    base = publish("base/tiny", b"base", kind="base")
    data = publish("run/data", b"data", kind="data", inputs={"base": base.reference})
    publish("run/adapter", b"adapter", inputs={"data": data.reference})
    orphan(store, base)
    orphan(store, data)
    assert clean(store, progress).objects == ()
    assert store.find(base.reference) == base


def test_history_of_a_branch_stays_but_old_checkpoints_go(store, publish, progress):
    for step in range(3):
        publish("run/adapter", f"adapter {step}".encode())
        publish("run/checkpoint-0123", f"checkpoint {step}".encode(), kind="checkpoint")
    newest = store.resolve("run/checkpoint-0123")
    removed = clean(store, progress)
    assert len(removed.superseded) == 2
    assert len(store.history("run/adapter")) == 3
    assert [each.digest for each in store.history("run/checkpoint-0123")] == [newest.digest]
    assert sum(entry.key.startswith(keys.MANIFESTS) for entry in removed.objects) == 2
    publish("run/checkpoint-0123", b"checkpoint 3", kind="checkpoint")
    assert [each.sequence for each in store.history("run/checkpoint-0123")] == [4, 3]


def test_a_tagged_checkpoint_stays(store, publish, progress):
    first = publish("run/checkpoint-0123", b"checkpoint 0", kind="checkpoint", tags=("best",))
    publish("run/checkpoint-0123", b"checkpoint 1", kind="checkpoint")
    assert clean(store, progress).objects == ()
    assert store.resolve("run/checkpoint-0123:best") == first


def test_what_is_younger_than_the_grace_period_stays(store, publish, progress):
    publish("run/checkpoint-0123", b"checkpoint 0", kind="checkpoint")
    publish("run/checkpoint-0123", b"checkpoint 1", kind="checkpoint")
    orphan(store, publish("run/other", b"young"))
    store.backend.put_if_absent(keys.blob("5" * 64), b"its manifest is still to come")
    assert clean(store, progress, timedelta(hours=1)) == collect.Plan((), (), (), ())


def test_a_young_manifest_keeps_its_old_blobs(directory_store, make_draft, progress, tmp_path):
    young = directory_store.publish(make_draft({"a.safetensors": b"old bytes"}), progress)
    orphan(directory_store, young)
    long_ago = time.time() - 9 * 24 * 3600
    os.utime(directory_store.backend.root / keys.blob(young.files[0].digest), (long_ago, long_ago))
    assert clean(directory_store, progress, timedelta(days=7)).objects == ()
    directory_store.pull(young, tmp_path / "pulled", progress)


def test_young_uploads_stay(store, progress, request):
    if request.node.callspec.params["backend"] == "moto":
        pytest.skip("moto says of every upload that it was begun in 2010")
    store.backend.upload(keys.blob("5" * 64), 6 << 20, 5 << 20).close()
    assert clean(store, progress, timedelta(hours=1)).uploads == ()


def test_small_files_being_written_stay_without_any_grace(directory_store, progress):
    writing = directory_store.backend.root / ".tmp" / "put-0123"
    writing.parent.mkdir(exist_ok=True)
    writing.write_bytes(b"half")
    assert clean(directory_store, progress).uploads == ()
    hours_ago = time.time() - 2 * 3600
    os.utime(writing, (hours_ago, hours_ago))
    assert len(clean(directory_store, progress).uploads) == 1
    assert not writing.exists()


def test_young_leases_protect_and_ended_ones_do_not(store, publish, progress, monkeypatch):
    gone = publish("run/other", b"leased")
    orphan(store, gone)
    lease = write_lease(store.backend, [gone.files[0].digest])
    removed = clean(store, progress)
    assert keys.blob(gone.files[0].digest) not in {entry.key for entry in removed.objects}
    assert [each.identifier for each in leases(store.backend)] == [lease.identifier]
    monkeypatch.setattr("tunemill.store.lease.LEASE_LIFE", NOTHING)
    monkeypatch.setattr(collect, "LEASE_LIFE", NOTHING)
    removed = clean(store, progress)
    assert [entry.key for entry in removed.objects] == [keys.blob(gone.files[0].digest)]
    assert [entry.key for entry in removed.leftovers] == [keys.lease(lease.identifier)]


def test_abandoned_uploads_go_but_not_leased_ones(store, progress):
    for digit in "56":
        store.backend.upload(keys.blob(digit * 64), 6 << 20, 5 << 20).close()
    write_lease(store.backend, ["6" * 64])
    assert [upload.key for upload in clean(store, progress).uploads] == [keys.blob("5" * 64)]
    assert [upload.key for upload in store.backend.unfinished()] == [keys.blob("6" * 64)]


def test_leftovers_of_killed_collections_and_doctors_go(store, progress, monkeypatch):
    dead = announce(store.backend, ["7" * 64])
    store.backend.put_if_absent(f"{keys.PROBES}dead/000000", b"")
    monkeypatch.setattr(collect, "COLLECTION_LIFE", NOTHING)
    removed = [entry.key for entry in clean(store, progress).leftovers]
    assert removed == [keys.collection(dead.identifier), f"{keys.PROBES}dead/000000"]
    assert list(store.backend.list(keys.COLLECTIONS)) == []


def test_attestations_go_with_their_manifest(store, publish, progress):
    kept, gone = publish("run/adapter", b"kept"), publish("run/other", b"gone")
    for artifact in (kept, gone):
        key = keys.attestation(artifact.digest.removeprefix("sha256:"), "8" * 64)
        store.backend.put_if_absent(key, b"signed")
    orphan(store, gone)
    removed = [entry.key for entry in clean(store, progress).objects]
    assert removed[0].startswith(f"{keys.ATTESTATIONS}{gone.digest.removeprefix('sha256:')}/")
    assert len(list(store.backend.list(keys.ATTESTATIONS))) == 1
    order = [key.partition("/")[0] for key in removed]
    assert order == sorted(order, key=["attestations", "manifests", "blobs"].index)


def test_a_damaged_store_is_not_collected(store, publish, progress):
    artifact = publish("run/adapter", b"kept")
    orphan(store, publish("run/other", b"gone"))
    store.backend.delete(keys.manifest(artifact.digest.removeprefix("sha256:")))
    before = everything(store)
    with pytest.raises(BadDataError, match="nothing was deleted") as caught:
        clean(store, progress)
    assert "\n" not in str(caught.value)
    assert everything(store) == before


def at_settling(monkeypatch, action):
    """Run ``action`` when a collection has announced and waits, before it marks again."""
    done = []

    def sleep(_seconds):
        if not done:
            done.append(True)
            action()

    monkeypatch.setattr(collect.time, "sleep", sleep)


def test_a_publish_that_began_before_the_second_mark_is_spared(
    store, publish, progress, monkeypatch, tmp_path
):
    """The publisher looked for collections before this one was announced, and trusts the old blob."""
    gone = publish("run/other", b"wanted again")
    orphan(store, gone)
    digests = [blob.hex for blob in store.manifest(gone).blobs] + [gone.digest.removeprefix("sha256:")]
    at_settling(monkeypatch, lambda: write_lease(store.backend, digests))
    assert clean(store, progress).objects == ()
    store.pull(gone, tmp_path / "pulled", progress)


def test_a_commit_during_the_wait_is_spared(store, publish, progress, monkeypatch, tmp_path):
    gone = publish("run/other", b"tagged again")
    orphan(store, gone)
    reference = store.resolve(gone.reference).reference
    at_settling(monkeypatch, lambda: _commit(store, reference))
    assert clean(store, progress).objects == ()
    store.pull(store.resolve("run/other:rescued"), tmp_path / "pulled", progress)


def _commit(store, reference):
    from tunemill.store.publish import commit_tag

    artifact = store.resolve(reference)
    commit_tag(store.backend, artifact.name, "rescued", artifact.digest, 1)


def test_a_tag_during_a_collection_waits_for_its_outcome(store, publish, progress, monkeypatch):
    """The tag would name what is being deleted; it has to be refused, not to dangle."""
    gone = publish("run/other", b"too late")
    orphan(store, gone)
    errors, said = [], []
    monkeypatch.setattr(Progress, "say", lambda _self, message: said.append(message))
    tagger = threading.Thread(target=lambda: errors.append(_error(store.tag, gone.reference, "late")))
    after_second_mark(monkeypatch, lambda: (tagger.start(), _wait_for(lambda: said)))
    assert clean(store, progress).objects != ()
    tagger.join(60)
    assert isinstance(errors[0], IntegrityError)
    assert store.tags("run/other") == []


def _error(call, *arguments):
    try:
        call(*arguments)
    except TunemillError as error:
        return error
    return None


def after_second_mark(monkeypatch, action):
    """Run ``action`` when a collection has decided what to delete and has deleted nothing yet."""
    real, calls = collect._mark, []

    def mark(*arguments):
        found = real(*arguments)
        calls.append(found)
        if len(calls) == 2:
            action()
        return found

    monkeypatch.setattr(collect, "_mark", mark)


def test_a_publish_that_begins_during_a_collection_waits_and_sends_again(
    store, publish, make_draft, make_provenance, progress, monkeypatch, tmp_path
):
    """Announced, then a publish of the same bytes starts, then the blobs are deleted under it."""
    gone = publish("run/other", b"sent again")
    orphan(store, gone)
    said: list[str] = []
    monkeypatch.setattr(progress, "say", said.append)
    draft = make_draft(
        {"model.safetensors": b"sent again"}, name="run/new", provenance=make_provenance(inputs={})
    )
    result = []
    publisher = threading.Thread(target=lambda: result.append(store.publish(draft, progress)))

    after_second_mark(monkeypatch, lambda: (publisher.start(), _wait_for(lambda: said)))
    removed = clean(store, progress)
    publisher.join(60)
    assert keys.blob(gone.files[0].digest) in {entry.key for entry in removed.objects}
    assert "waiting for a garbage collection" in said[0]
    store.pull(result[0], tmp_path / "pulled", progress)
    assert (tmp_path / "pulled/model.safetensors").read_bytes() == b"sent again"


def _wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the publisher never noticed the collection"
        time.sleep(0.01)


def test_publishers_and_collectors_side_by_side_lose_nothing(
    store, make_draft, make_provenance, progress, tmp_path
):
    """Writers publish the same few contents over and over while a collector without grace deletes."""
    stop, failures = threading.Event(), []

    def collector():
        while not stop.is_set():
            sweep(store.backend, NOTHING, progress, settle_seconds=0)

    def writer(number):
        for turn in range(4):
            name = f"run/w{number}"
            made = make_provenance(inputs={})
            draft = make_draft({"a.safetensors": f"content {turn % 2}".encode()}, name=name, provenance=made)
            artifact = store.publish(draft, progress)
            destination = tmp_path / f"pulled-{number}-{turn}"
            store.pull(artifact, destination, progress)
            orphan(store, artifact)

    def run(task, *arguments):
        try:
            task(*arguments)
        except BaseException as error:
            failures.append(error)
            stop.set()
            raise

    threads = [threading.Thread(target=run, args=(writer, number)) for number in range(2)]
    collecting = threading.Thread(target=run, args=(collector,))
    for thread in [collecting, *threads]:
        thread.start()
    for thread in threads:
        thread.join(120)
    stop.set()
    collecting.join(120)
    assert failures == []


def test_credentials_that_may_not_delete(directory_store, make_draft, progress, monkeypatch):
    orphan(directory_store, directory_store.publish(make_draft({"a.safetensors": b"a"}), progress))

    def denied(key):
        raise DeniedError(f"deleting {key} was denied")

    monkeypatch.setattr(directory_store.backend, "delete", denied)
    with pytest.raises(DeniedError) as caught:
        clean(directory_store, progress)
    assert caught.value.exit_code == 77
    assert list(directory_store.backend.list(keys.COLLECTIONS)) == [], "publishers would wait for it"


def test_a_collection_that_takes_too_long_stops(directory_store, make_draft, progress, monkeypatch):
    orphan(directory_store, directory_store.publish(make_draft({"a.safetensors": b"a"}), progress))
    monkeypatch.setattr(collect, "DELETE_WITHIN", timedelta(seconds=-1))
    before = everything(directory_store)
    with pytest.raises(TransientError, match="run it again"):
        clean(directory_store, progress)
    assert everything(directory_store) == before
    assert list(directory_store.backend.list(keys.COLLECTIONS)) == []

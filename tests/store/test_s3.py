"""S3 servers that fail, lie or refuse: each is one clear error with its exit code, or is coped with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from backends import MakeDraft, s3_environment
from tunemill.errors import (
    ConfigurationError,
    ConflictError,
    DeniedError,
    TransientError,
    TunemillError,
    UsageError,
)
from tunemill.progress import Progress
from tunemill.store import Store, keys, open_store, reference
from tunemill.store.backend import Transfer
from tunemill.store.reference import create_reference, new_reference
from tunemill.store.s3 import S3Backend, open_bucket
from unreliable import Misbehaviour, Seen, unreliable

PART = 5 << 20


@contextmanager
def through_proxy(backend: S3Backend, misbehaviour: Misbehaviour) -> Iterator[S3Backend]:
    """The same bucket, reached through a proxy."""
    with (
        unreliable(backend.client.meta.endpoint_url, misbehaviour) as address,
        s3_environment(address, "anyone", "anything"),
    ):
        yield S3Backend(backend.bucket, backend.prefix)


def first(matches: Callable[[Seen], bool], times: int = 1) -> Callable[[Seen], bool]:
    """True for the first requests that match."""
    left = [times]

    def ask(request: Seen) -> bool:
        if left[0] and matches(request):
            left[0] -= 1
            return True
        return False

    return ask


def is_put(request: Seen) -> bool:
    return request.method == "PUT"


class TestLostReplies:
    def test_a_creation_whose_reply_was_lost_is_ours(self, moto: S3Backend) -> None:
        """The library sends it again and is told 412; the write id tells that it was us."""
        ours = new_reference(f"sha256:{'1' * 64}", 10)
        with through_proxy(moto, Misbehaviour(lose_reply=first(is_put))) as backend:
            assert create_reference(backend, keys.tag("base/tiny", "v1"), ours) == ours

    def test_a_creation_whose_every_reply_is_lost_is_ours(self, moto: S3Backend) -> None:
        ours = new_reference(f"sha256:{'1' * 64}", 10)
        with through_proxy(moto, Misbehaviour(lose_reply=is_put)) as backend:
            assert create_reference(backend, keys.tag("base/tiny", "v1"), ours) == ours

    def test_another_writer_who_was_first_is_not_mistaken_for_us(self, moto: S3Backend) -> None:
        theirs = new_reference(f"sha256:{'2' * 64}", 10)
        create_reference(moto, keys.tag("base/tiny", "v1"), theirs)
        ours = new_reference(f"sha256:{'2' * 64}", 10)
        with through_proxy(moto, Misbehaviour(lose_reply=is_put)) as backend:
            assert create_reference(backend, keys.tag("base/tiny", "v1"), ours) == theirs

    def test_a_write_that_never_arrives_is_transient(
        self, moto: S3Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(reference, "ATTEMPTS", 1)  # the S3 client pauses between its own five

        def refuse(request: Seen) -> tuple[int, str] | None:
            return (503, "SlowDown") if is_put(request) else None

        with (
            through_proxy(moto, Misbehaviour(refuse=refuse)) as backend,
            pytest.raises(TransientError, match="SlowDown"),
        ):
            create_reference(backend, keys.tag("base/tiny", "v1"), new_reference(f"sha256:{'1' * 64}", 10))

    @pytest.mark.parametrize(
        "lost",
        [
            pytest.param(lambda request: "partNumber=2" in request.path, id="part"),
            pytest.param(
                lambda request: request.method == "POST" and "uploadId" in request.path, id="completion"
            ),
            pytest.param(lambda request: is_put(request) and "/manifests/" in request.path, id="manifest"),
            pytest.param(lambda request: is_put(request) and "/branches/" in request.path, id="branch"),
            pytest.param(lambda request: is_put(request) and "/leases/" in request.path, id="lease"),
        ],
    )
    def test_a_publish_survives_a_lost_reply(
        self, moto: S3Backend, make_draft: MakeDraft, lost: Callable[[Seen], bool]
    ) -> None:
        draft = make_draft({"model.safetensors": os.urandom(PART + 1000)}, tags=("v1",))
        misbehaviour = Misbehaviour(lose_reply=first(lost))
        with through_proxy(moto, misbehaviour) as backend:
            published = Store(backend, Transfer(part=PART)).publish(draft, Progress(quiet=True))
        assert Store(moto).resolve("tiny-stdlib/adapter") == published
        assert len(Store(moto).history("tiny-stdlib/adapter")) == 1


class TestBrokenReads:
    def test_a_range_that_breaks_off_is_continued(self, moto: S3Backend, make_draft: MakeDraft) -> None:
        data = os.urandom(3_000_000)
        store = Store(moto)
        artifact = store.publish(make_draft({"model.safetensors": data}), Progress(quiet=True))
        broken = Misbehaviour(cut_body=first(lambda r: r.method == "GET" and "/blobs/" in r.path, times=2))
        folder = make_draft({}).directory
        with through_proxy(moto, broken) as backend:
            target = folder / "in"
            Store(backend, cache=folder / "cache").pull(artifact, target, Progress(quiet=True))
        assert (target / "model.safetensors").read_bytes() == data
        ranges = [seen.headers["Range"] for seen in broken.seen if "Range" in seen.headers]
        assert len(ranges) == 3
        assert not ranges[1].startswith("bytes=0-"), "it began again instead of going on"


class TestChecksums:
    def test_a_server_that_rejects_sha256_headers_gets_md5(self, moto: S3Backend) -> None:
        def refuse(request: Seen) -> tuple[int, str] | None:
            names = {name.lower() for name in request.headers}
            return (501, "NotImplemented") if "x-amz-checksum-sha256" in names else None

        misbehaviour = Misbehaviour(refuse=refuse)
        with through_proxy(moto, misbehaviour) as backend:
            assert backend.put_if_absent("leases/a", b"x")
            assert backend.put_if_absent("leases/b", b"x")
        puts = [{name.lower() for name in seen.headers} for seen in misbehaviour.seen if is_put(seen)]
        assert ["content-md5" in names for names in puts] == [False, True, True]

    def test_every_write_carries_a_sha256(self, moto: S3Backend) -> None:
        misbehaviour = Misbehaviour()
        with through_proxy(moto, misbehaviour) as backend:
            backend.put_if_absent("leases/a", b"x")
            upload = backend.upload("blobs/sha256/aa", 1, PART)
            upload.send(1, b"x", hashlib.sha256(b"x").digest())
            upload.complete()
        for seen in misbehaviour.seen:
            if is_put(seen):
                assert "x-amz-checksum-sha256" in {name.lower() for name in seen.headers}


def refusing(status: int, code: str) -> Misbehaviour:
    return Misbehaviour(refuse=lambda _: (status, code))


class TestOpening:
    @pytest.mark.parametrize(
        ("misbehaviour", "kind", "reason"),
        [
            pytest.param(refusing(403, "InvalidAccessKeyId"), DeniedError, "was denied", id="wrong key"),
            pytest.param(refusing(403, "SignatureDoesNotMatch"), DeniedError, "was denied", id="secret"),
            pytest.param(refusing(403, "AccessDenied"), DeniedError, "AccessDenied", id="no right"),
            pytest.param(refusing(401, "Unauthorized"), DeniedError, "was denied", id="not logged in"),
            pytest.param(refusing(404, "NoSuchBucket"), ConfigurationError, "no bucket", id="no bucket"),
            pytest.param(refusing(403, "RequestTimeTooSkewed"), ConfigurationError, "Skewed", id="clock"),
            pytest.param(refusing(501, "NotImplemented"), ConfigurationError, "NotImpl", id="not S3"),
            pytest.param(refusing(503, "SlowDown"), TransientError, "SlowDown", id="overloaded"),
            pytest.param(Misbehaviour(page=b"<html>hello</html>"), ConfigurationError, "S3", id="a web page"),
            pytest.param(Misbehaviour(page=b"hello"), TransientError, "opening s3://", id="garbage"),
            pytest.param(Misbehaviour(lose_reply=lambda _: True), TransientError, "again", id="hangs up"),
        ],
    )
    def test_a_store_that_cannot_be_used_is_named(
        self,
        moto: S3Backend,
        misbehaviour: Misbehaviour,
        kind: type[TunemillError],
        reason: str,
    ) -> None:
        with (
            unreliable(moto.client.meta.endpoint_url, misbehaviour) as address,
            s3_environment(address, "anyone", "anything"),
            pytest.raises(kind, match=reason) as caught,
        ):
            open_store(moto.url)
        assert type(caught.value) is kind
        assert "\n" not in str(caught.value)
        assert f"s3://{moto.bucket}" in str(caught.value)

    def test_a_bucket_that_does_not_exist(self, moto: S3Backend) -> None:
        with pytest.raises(ConfigurationError, match=r"no bucket 'absent-bucket'.*store create"):
            open_store("s3://absent-bucket")

    def test_no_credentials(self, moto: S3Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(DeniedError, match="set AWS_ACCESS_KEY_ID"):
            open_store(moto.url)

    @pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
    def test_an_endpoint_that_is_no_address(
        self, moto: S3Backend, monkeypatch: pytest.MonkeyPatch, variable: str
    ) -> None:
        monkeypatch.setenv(variable, "not an address")
        with pytest.raises(ConfigurationError):
            open_store(moto.url)

    @pytest.mark.parametrize("address", ["", "/prefix", "bucket/a/../b", "bucket//a"])
    def test_an_address_without_a_bucket(self, address: str) -> None:
        with pytest.raises(UsageError, match="names no store"):
            open_bucket(address)

    def test_two_prefixes_of_a_bucket_are_two_stores(self, moto: S3Backend) -> None:
        other = S3Backend(moto.bucket, "some/other")
        moto.put_if_absent("tags/base/tiny/v1", b"x")
        assert other.get("tags/base/tiny/v1") is None
        assert list(other.list("tags/")) == []
        assert list(other.unfinished()) == []


@pytest.mark.s3
class TestRealServer:
    def test_a_wrong_secret_is_denied(self) -> None:
        endpoint = os.environ.get("TUNEMILL_TEST_S3")
        if not endpoint:
            pytest.skip("TUNEMILL_TEST_S3 names no real S3 server; `make test-s3` starts one")
        with (
            s3_environment(endpoint, os.environ["AWS_ACCESS_KEY_ID"], "wrong"),
            pytest.raises(DeniedError, match="was denied"),
        ):
            open_store("s3://some-bucket")


def test_a_publish_that_lost_its_tag_leaves_no_trace_of_a_name(
    moto: S3Backend, make_draft: MakeDraft
) -> None:
    store = Store(moto)
    first_one = store.publish(make_draft({"a.json": b"1"}, tags=("v1",)), Progress(quiet=True))
    with pytest.raises(ConflictError, match="a tag never changes"):
        store.publish(make_draft({"a.json": b"2"}, tags=("v1",)), Progress(quiet=True))
    assert store.resolve("tiny-stdlib/adapter:v1") == first_one
    assert len(store.history("tiny-stdlib/adapter")) == 1

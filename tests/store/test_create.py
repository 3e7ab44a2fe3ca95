"""Making the place of a store: once, by whoever comes first, and with a reason where it cannot be."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backends import BACKENDS, open_environment, s3_environment
from tunemill import cli
from tunemill.errors import ConfigurationError, DeniedError, TransientError, TunemillError, UsageError
from tunemill.store import create_store, open_store, s3
from tunemill.store.s3 import S3Backend
from unreliable import Misbehaviour, Seen, unreliable


@pytest.fixture(params=BACKENDS)
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where no store is yet, on each kind of server."""
    if request.param == "directory":
        yield str(tmp_path / "deep" / "store")
        return
    with open_environment(request.param, request):
        yield f"s3://tunemill-{uuid.uuid4().hex[:16]}/some/prefix"


def test_a_store_is_made_once_and_can_be_used(address: str) -> None:
    with pytest.raises(ConfigurationError, match="tunemill store create"):
        open_store(address)
    store, made = create_store(address)
    assert made
    assert store.backend.put_if_absent("leases/a", b"x")
    again, made = create_store(address)
    assert not made
    assert again.backend.get("leases/a") == b"x"
    assert open_store(address).names() == []


def test_of_several_that_make_it_at_once_none_fails(address: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        stores = [store for store, _ in pool.map(lambda _: create_store(address), range(4))]
    assert stores[0].backend.put_if_absent("leases/a", b"x")
    assert [store.backend.get("leases/a") for store in stores] == [b"x"] * 4


def test_a_bucket_lies_in_the_configured_region(moto: S3Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    store, _ = create_store(f"s3://tunemill-{uuid.uuid4().hex[:16]}")
    assert isinstance(store.backend, S3Backend)
    found = store.backend.client.get_bucket_location(Bucket=store.backend.bucket)
    assert found["LocationConstraint"] == "eu-central-1"


def answering(*answers: tuple[str, int, str]) -> Callable[[Seen], tuple[int, str] | None]:
    """Refuse requests of a method with status and code, each answer once; the last of a method stays."""
    left = list(answers)

    def refuse(request: Seen) -> tuple[int, str] | None:
        for answer in left:
            if answer[0] == request.method:
                if sum(other[0] == request.method for other in left) > 1:
                    left.remove(answer)
                return answer[1:]
        return None

    return refuse


NO_BUCKET = ("GET", 404, "NoSuchBucket")


@pytest.mark.parametrize(
    ("answers", "kind", "reason"),
    [
        pytest.param(
            (NO_BUCKET, ("GET", 403, "AccessDenied"), ("PUT", 409, "BucketAlreadyExists")),
            DeniedError,
            "belongs to somebody else",
            id="owned by others",
        ),
        pytest.param((("GET", 403, "AccessDenied"),), DeniedError, "AccessDenied", id="not to be listed"),
        pytest.param(
            (NO_BUCKET, ("PUT", 403, "AccessDenied")), DeniedError, "making the bucket of", id="no right"
        ),
        pytest.param(
            (NO_BUCKET, ("PUT", 400, "InvalidLocationConstraint")),
            ConfigurationError,
            "set AWS_DEFAULT_REGION",
            id="unknown region",
        ),
        pytest.param(
            (NO_BUCKET, ("PUT", 400, "TooManyBuckets")), ConfigurationError, "TooManyBuckets", id="too many"
        ),
        pytest.param(
            (NO_BUCKET, ("PUT", 503, "ServiceUnavailable")), TransientError, "run it again", id="overloaded"
        ),
        pytest.param(
            (NO_BUCKET, ("PUT", 409, "OperationAborted")), TransientError, "does not show", id="never appears"
        ),
    ],
)
def test_a_bucket_that_cannot_be_made_is_one_line(
    moto: S3Backend,
    monkeypatch: pytest.MonkeyPatch,
    answers: tuple[tuple[str, int, str], ...],
    kind: type[TunemillError],
    reason: str,
) -> None:
    monkeypatch.setattr(s3, "CREATE_PAUSE_SECONDS", 0.0)
    with (
        unreliable(moto.endpoint, Misbehaviour(refuse=answering(*answers))) as proxy,
        s3_environment(proxy, "anyone", "anything"),
        pytest.raises(kind, match=reason) as caught,
    ):
        create_store("s3://some-bucket")
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_a_name_that_not_every_server_takes_is_refused(moto: S3Backend) -> None:
    with pytest.raises(UsageError, match="'Some_Bucket' is no name for a bucket"):
        create_store("s3://Some_Bucket/prefix")


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_is_in_the_way(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("something")
    with pytest.raises(ConfigurationError, match="there is a file of that name"):
        create_store(str(tmp_path / place))


def test_another_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigurationError, match=r"holds 'thesis.tex'"):
        create_store(str(tmp_path))


def test_the_command_says_where_and_whether_it_made_it(
    moto: S3Backend, capfd: pytest.CaptureFixture[str]
) -> None:
    url = f"s3://tunemill-{uuid.uuid4().hex[:16]}/lab"
    cli._talk_on_stderr()
    assert cli.run(["store", "create", "--store", url]) == 0
    stdout, stderr = capfd.readouterr()
    assert stdout == f"{url}\n"
    assert stderr == f"made {url} at {moto.endpoint}\n"
    assert cli.run(["store", "create", "--store", url, "--json"]) == 0
    stdout, stderr = capfd.readouterr()
    assert json.loads(stdout) == {"url": url, "endpoint": moto.endpoint, "created": False}
    assert stderr == f"{url} at {moto.endpoint} is there already\n"

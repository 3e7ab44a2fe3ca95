"""The S3 backend: keys are objects below one prefix of a bucket, at any endpoint.

Only create-only (``If-None-Match: *``) is relied on; it is what servers agree on. Addressing is by path,
since most endpoints have no wildcard DNS. Every write carries an explicit sha256, which servers that know
the header check and others ignore; where one rejects it, Content-MD5 takes its place. Endpoint, keys,
region and CA come from the usual AWS variables and files.
"""

from __future__ import annotations

import base64
import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import boto3
import botocore.exceptions as failures
from botocore.config import Config
from botocore.parsers import ResponseParserError

from tunemill.errors import (
    ConfigurationError,
    DeniedError,
    IntegrityError,
    TransientError,
    UsageError,
)
from tunemill.store.backend import LARGEST_SMALL_OBJECT, Backend, Data, Entry, Unfinished, Upload
from tunemill.store.s3_errors import ABSENT, NO_CHECKSUM, TAKEN, code, explain
from tunemill.store.s3_patience import Patience

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

PIECE = 1 << 20  # bytes yielded at once while reading
CONNECTIONS = 16  # more than the workers of one transfer, so that none waits for a socket
CONNECT_SECONDS = 10
READ_SECONDS = 60
PLAIN_REGION = "us-east-1"  # the one that buckets are made in by naming none
EXISTS_ALREADY = ("BucketAlreadyExists", "BucketAlreadyOwnedByYou", "OperationAborted")
CREATE_TRIES = 30
CREATE_PAUSE_SECONDS = 1.0  # servers with many frontends take a few seconds to tell them all
BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


class S3Backend(Backend):
    """A store in ``bucket`` below ``prefix``, which is empty or ends in ``/``."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.url = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self.knows_sha256 = True
        with self.errors("connecting to"):
            self.client = _connect(Patience(self.url))
        self.endpoint = str(self.client.meta.endpoint_url)

    def check(self) -> None:
        """See the base class."""
        with self.errors("opening"):
            answer: Any = self.client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)
        if "KeyCount" not in answer and "Name" not in answer:
            raise ConfigurationError(f"{self._where} does not answer as an S3 server: check AWS_ENDPOINT_URL")

    def make(self) -> bool:
        """See the base class; the bucket is made in the configured region, for all its prefixes.

        Raises:
            UsageError: its name is none that every server takes.
        """
        if self._exists():
            return False
        if not BUCKET.fullmatch(self.bucket) or ".." in self.bucket:
            raise UsageError(
                f"'{self.bucket}' is no name for a bucket: expected 3 to 63 of a-z, 0-9, '-' and '.', "
                "the first and last a letter or digit"
            )
        region = self.client.meta.region_name
        arguments: Any = {}
        if region != PLAIN_REGION:
            arguments["CreateBucketConfiguration"] = {"LocationConstraint": region}
        with self.errors("making the bucket of"):
            try:
                self.client.create_bucket(Bucket=self.bucket, **arguments)
            except failures.ClientError as error:
                if code(error) not in EXISTS_ALREADY:
                    raise
                self._refuse_foreign()
        self._wait_until_there()
        return True

    def _exists(self) -> bool:
        with self.errors("opening"):
            try:
                self.client.list_objects_v2(Bucket=self.bucket, MaxKeys=1)
            except failures.ClientError as error:
                if code(error) == "NoSuchBucket":
                    return False
                raise
        return True

    def _refuse_foreign(self) -> None:
        """Accept a bucket that another process made for the same owner a moment ago."""
        try:
            self._exists()
        except DeniedError as error:
            raise DeniedError(
                f"the bucket '{self.bucket}' at {self.endpoint} belongs to somebody else: choose another name"
            ) from error

    def _wait_until_there(self) -> None:
        for _ in range(CREATE_TRIES):
            if self._exists():
                return
            time.sleep(CREATE_PAUSE_SECONDS)
        raise TransientError(f"{self._where} took the new bucket and does not show it: run it again")

    def now(self) -> datetime:
        """See the base class; from the ``Date`` of a reply, to the second."""
        with self.errors("asking the time of"):
            answer = self.client.head_bucket(Bucket=self.bucket)
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        if not date:
            raise ConfigurationError(f"{self._where} sends no Date, which ages of leases are counted by")
        # Some proxies add a second Date, and then the zone is lost; HTTP knows no other than GMT.
        return parsedate_to_datetime(date).replace(tzinfo=UTC)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See the base class."""
        with self.errors(f"creating {key} in"):
            try:
                self._checked(self.client.put_object, data, Key=self.prefix + key, IfNoneMatch="*")
            except failures.ClientError as error:
                if code(error) in TAKEN:
                    return False
                raise
        return True

    def get(self, key: str, limit: int = LARGEST_SMALL_OBJECT) -> bytes | None:
        """See the base class."""
        with self.errors(f"reading {key} in"):
            try:
                answer = self.client.get_object(Bucket=self.bucket, Key=self.prefix + key)
            except failures.ClientError as error:
                if code(error) in ABSENT:
                    return None
                raise
            with closing(answer["Body"]) as body:
                # Not read(limit + 1) first: the checksum is only compared when the body ends.
                if answer["ContentLength"] > limit:
                    raise IntegrityError(f"{self.url}/{key} is larger than the {limit} bytes allowed for it")
                return body.read()

    def head(self, key: str) -> Entry | None:
        """See the base class."""
        with self.errors(f"looking up {key} in"):
            try:
                found = self.client.head_object(Bucket=self.bucket, Key=self.prefix + key)
            except failures.ClientError as error:
                if code(error) in ABSENT:
                    return None
                raise
        return Entry(key, found["ContentLength"], found["LastModified"].astimezone(UTC), found["ETag"])

    def read(self, entry: Entry, offset: int, length: int) -> Iterator[bytes]:
        """See the base class."""
        if length <= 0:
            return
        with self.errors(f"reading {entry.key} in"):
            answer = self.client.get_object(
                Bucket=self.bucket,
                Key=self.prefix + entry.key,
                Range=f"bytes={offset}-{offset + length - 1}",
                IfMatch=entry.etag,
            )
            if answer["ResponseMetadata"]["HTTPStatusCode"] != 206 and length != entry.size:
                raise ConfigurationError(f"{self._where} ignores the Range of a request")
            left = length
            with closing(answer["Body"]) as body:
                while left and (piece := body.read(min(PIECE, left))):
                    left -= len(piece)
                    yield piece
        if left:
            raise TransientError(f"{self.url}/{entry.key} ended {left} bytes early: run it again")

    def list(self, prefix: str) -> Iterator[Entry]:
        """See the base class."""
        for page in self._pages(prefix):
            for found in page.get("Contents", []):
                key = found["Key"].removeprefix(self.prefix)
                yield Entry(key, found["Size"], found["LastModified"].astimezone(UTC), found["ETag"])

    def folders(self, prefix: str) -> Iterator[str]:
        """See the base class."""
        for page in self._pages(prefix, Delimiter="/"):
            for found in page.get("CommonPrefixes", []):
                yield found["Prefix"].removeprefix(self.prefix + prefix).rstrip("/")

    def delete(self, key: str) -> None:
        """See the base class."""
        with self.errors(f"deleting {key} in"):
            self.client.delete_object(Bucket=self.bucket, Key=self.prefix + key)

    def upload(self, key: str, size: int, part_size: int) -> S3Upload:
        """See the base class; of several unfinished uploads of the key the newest is continued."""
        found = [upload for upload in self._uploads(self.prefix + key) if upload.key == key]
        if found:
            identifier = max(found, key=lambda upload: upload.started).identifier
            return S3Upload(self, key, identifier, -(-size // part_size), self._parts(key, identifier))
        with self.errors(f"beginning an upload of {key} in"):
            arguments: Any = {"ChecksumAlgorithm": "SHA256"} if self.knows_sha256 else {}
            answer = self.client.create_multipart_upload(
                Bucket=self.bucket, Key=self.prefix + key, **arguments
            )
        return S3Upload(self, key, answer["UploadId"], -(-size // part_size), {})

    def unfinished(self) -> Iterator[Unfinished]:
        """See the base class."""
        return self._uploads(self.prefix)

    def abort(self, upload: Unfinished) -> None:
        """See the base class."""
        with self.errors(f"aborting an upload of {upload.key} in"):
            try:
                self.client.abort_multipart_upload(
                    Bucket=self.bucket, Key=self.prefix + upload.key, UploadId=upload.identifier
                )
            except failures.ClientError as error:
                if code(error) != "NoSuchUpload":
                    raise

    @property
    def _where(self) -> str:
        return f"{self.url} at {self.endpoint}"

    def _pages(self, prefix: str, **options: Any) -> Iterator[Any]:
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self.prefix + prefix, **options
        )
        with self.errors(f"listing {prefix} in"):
            yield from pages

    def _uploads(self, prefix: str) -> Iterator[Unfinished]:
        pages = self.client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self.bucket, Prefix=prefix
        )
        with self.errors("listing uploads in"):
            for page in pages:
                for found in page.get("Uploads", []):
                    key = found["Key"].removeprefix(self.prefix)
                    yield Unfinished(key, found["UploadId"], found["Initiated"].astimezone(UTC))

    def _parts(self, key: str, identifier: str) -> dict[int, Any]:
        pages = self.client.get_paginator("list_parts").paginate(
            Bucket=self.bucket, Key=self.prefix + key, UploadId=identifier
        )
        with self.errors(f"listing parts of {key} in"):
            try:
                return {part["PartNumber"]: part for page in pages for part in page.get("Parts", [])}
            except failures.ClientError as error:
                if code(error) == "NoSuchUpload":
                    return {}
                raise

    def checksum(self, data: Data, sha256: bytes | None = None) -> dict[str, str]:
        """Return the arguments that announce these bytes by the strongest checksum this server takes."""
        if self.knows_sha256:
            digest = base64.b64encode(sha256 or hashlib.sha256(data).digest()).decode()
            # Ceph RGW compares the digest only when the algorithm is named as well.
            return {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": digest}
        return _md5(data)

    def _checked(self, operation: Any, data: Data, sha256: bytes | None = None, **arguments: Any) -> Any:
        """Send bytes with the strongest checksum this server takes."""
        checksum = self.checksum(data, sha256)
        try:
            return operation(Bucket=self.bucket, Body=data, **checksum, **arguments)
        except failures.ClientError as error:
            if not self.knows_sha256 or code(error) not in NO_CHECKSUM:
                raise
        answer = operation(Bucket=self.bucket, Body=data, **_md5(data), **arguments)
        self.knows_sha256 = False
        return answer

    @contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Turn what boto3 raises into the program's errors, naming what was done where."""
        try:
            yield
        except (failures.ClientError, failures.BotoCoreError, ResponseParserError, ValueError) as error:
            raise explain(error, doing, self.url, self.bucket) from error


class S3Upload(Upload):
    """A multipart upload, new or continued."""

    def __init__(
        self, backend: S3Backend, key: str, identifier: str, parts: int, found: dict[int, Any]
    ) -> None:
        self._backend, self._key, self._identifier, self._parts = backend, key, identifier, parts
        self._found = found
        self._sent: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._gone = False

    def holds(self, number: int, data: Data, sha256: bytes) -> bool:
        """See the base class; compared by the listed sha256, or by the ETag where that is an MD5."""
        part = self._found.get(number)
        if part is None or part.get("Size") != len(data):
            return False
        listed = part.get("ChecksumSHA256")
        if listed:
            same = bool(listed == base64.b64encode(sha256).decode())
        else:
            same = str(part["ETag"]).strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest()
        if same:
            self._remember(number, part)
        return same

    def send(self, number: int, data: Data, sha256: bytes) -> None:
        """See the base class."""
        if self._gone:
            return
        backend = self._backend
        with backend.errors(f"sending part {number} of {self._key} to"):
            try:
                answer = backend._checked(
                    backend.client.upload_part,
                    data,
                    sha256,
                    Key=backend.prefix + self._key,
                    UploadId=self._identifier,
                    PartNumber=number,
                )
            except failures.ClientError as error:
                if code(error) != "NoSuchUpload":
                    raise
                self._gone = True  # completed or aborted by another process: reading back will tell
                return
        self._remember(number, answer)

    def complete(self) -> bool:
        """See the base class."""
        if self._gone:
            return False
        if len(self._sent) != self._parts:
            raise TransientError(f"{self._parts - len(self._sent)} parts of {self._key} never arrived")
        backend = self._backend
        with backend.errors(f"completing {self._key} in"):
            try:
                backend.client.complete_multipart_upload(
                    Bucket=backend.bucket,
                    Key=backend.prefix + self._key,
                    UploadId=self._identifier,
                    MultipartUpload={"Parts": [self._sent[number] for number in sorted(self._sent)]},
                    IfNoneMatch="*",
                )
            except failures.ClientError as error:
                if code(error) in TAKEN:
                    self._drop()
                    return False
                if code(error) == "NoSuchUpload":
                    return False
                raise
        return True

    def close(self) -> None:
        """See the base class; there is nothing local to release."""

    def _remember(self, number: int, part: Any) -> None:
        kept = {"PartNumber": number, "ETag": part["ETag"]}
        if part.get("ChecksumSHA256"):
            kept["ChecksumSHA256"] = part["ChecksumSHA256"]
        with self._lock:
            self._sent[number] = kept

    def _drop(self) -> None:
        # Publishers need no right to delete; without it the bucket's lifecycle rule removes the parts.
        with suppress(DeniedError):
            self._backend.abort(Unfinished(self._key, self._identifier, datetime.min))


def open_bucket(address: str) -> S3Backend:
    """Return the backend for ``bucket/prefix``, as written after ``s3://``.

    Raises:
        UsageError: there is no bucket in it.
    """
    bucket, _, prefix = address.partition("/")
    if not bucket or "//" in address or any(part in (".", "..") for part in prefix.split("/")):
        raise UsageError(f"'s3://{address}' names no store: expected s3://bucket or s3://bucket/prefix")
    return S3Backend(bucket, prefix)


def _connect(patience: Patience) -> S3Client:
    session = boto3.session.Session()
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=CONNECTIONS,
        retries={"mode": "standard", "total_max_attempts": 5},
        s3={"addressing_style": "path"},
        # Each write has its own sha256 header; the library's trailing CRC is what some servers reject.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_supported",
    )
    client = session.client("s3", region_name=session.region_name or PLAIN_REGION, config=config)
    listener: Any = patience  # the stubs know no listener that answers
    client.meta.events.register_first("needs-retry.s3", listener)
    return client


def _md5(data: Data) -> dict[str, str]:
    digest = hashlib.md5(data, usedforsecurity=False).digest()
    return {"ContentMD5": base64.b64encode(digest).decode()}

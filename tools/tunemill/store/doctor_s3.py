"""What ``doctor.py`` asks of a bucket beyond the promises that every store keeps.

Looks for damaged bodies being refused, for a rule that removes abandoned uploads, and for a bucket that
strangers may read.
"""

from __future__ import annotations

from typing import Any

import boto3
import botocore.exceptions as failures
from botocore import UNSIGNED
from botocore.config import Config

from tunemill.errors import ConfigurationError
from tunemill.store.doctor import Check, Finding, Probe
from tunemill.store.s3 import S3Backend

SENT, ANNOUNCED = b"damaged on its way", b"as it was announced"
RULE_MISSING = (
    "none, so parts of killed uploads stay until 'tunemill store gc --delete': add one with "
    "AbortIncompleteMultipartUpload after 8 days"
)


def check_wrong_body(probe: Probe) -> Finding:
    """Whether an object whose bytes are not those announced is refused."""
    backend = _bucket(probe)
    name = "sha256" if backend.knows_sha256 else "MD5"
    announced: dict[str, Any] = dict(backend.checksum(ANNOUNCED))
    with backend.errors("sending a damaged object to"):
        try:
            backend.client.put_object(
                Bucket=backend.bucket, Key=backend.prefix + probe.key(), Body=SENT, **announced
            )
        except failures.ClientError as error:
            if 400 <= error.response["ResponseMetadata"]["HTTPStatusCode"] < 500:
                return Finding("damaged object", "ok", f"refused by its {name}")
            raise
    raise ConfigurationError(f"an object with a wrong {name} was taken: checksums are not compared")


def check_lifecycle(probe: Probe) -> Finding:
    """Whether the bucket removes abandoned uploads by itself."""
    backend = _bucket(probe)
    with backend.errors("asking for the lifecycle rules of"):
        try:
            answer = backend.client.get_bucket_lifecycle_configuration(Bucket=backend.bucket)
        except failures.ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            detail = RULE_MISSING if code == "NoSuchLifecycleConfiguration" else f"cannot be seen ({code})"
            return Finding("lifecycle rule", "note", detail)
    for rule in answer.get("Rules", []):
        if _removes_uploads(rule, backend.prefix):
            days = rule["AbortIncompleteMultipartUpload"].get("DaysAfterInitiation")
            return Finding("lifecycle rule", "ok", f"removes abandoned uploads after {days} days")
    return Finding("lifecycle rule", "note", RULE_MISSING)


def check_strangers(probe: Probe) -> Finding:
    """Whether requests without credentials are refused."""
    backend = _bucket(probe)
    config = Config(signature_version=UNSIGNED, s3={"addressing_style": "path"})
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=backend.client.meta.endpoint_url,
        region_name=backend.client.meta.region_name,
        config=config,
    )
    try:
        client.list_objects_v2(Bucket=backend.bucket, MaxKeys=1)
    except (failures.ClientError, failures.BotoCoreError):
        return Finding("strangers", "ok", "may not list the bucket")  # whatever the reason, they got nothing
    return Finding(
        "strangers", "note", "may list the bucket without credentials: close it unless it is meant so"
    )


def _bucket(probe: Probe) -> S3Backend:
    assert isinstance(probe.backend, S3Backend)
    return probe.backend


def _removes_uploads(rule: Any, prefix: str) -> bool:
    where = rule.get("Filter", {}).get("Prefix", rule.get("Prefix", ""))
    narrowed = set(rule.get("Filter", {})) - {"Prefix"}  # by tag or size, which parts do not have
    covers = prefix.startswith(where) and not narrowed
    return rule.get("Status") == "Enabled" and covers and "AbortIncompleteMultipartUpload" in rule


CHECKS: list[tuple[str, Check]] = [
    ("damaged object", check_wrong_body),
    ("lifecycle rule", check_lifecycle),
    ("strangers", check_strangers),
]

"""What boto3 raises, as the program's errors: each one line with what to do about it.

Most of these are met before anything works: no credentials, a file that is not mounted, an address
without ``http://``. boto3 says which of its parts gave up; here it is said which setting is wrong.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

import botocore.exceptions as failures

from tunemill.errors import ConfigurationError, DeniedError, IntegrityError, TransientError, TunemillError

ABSENT = {"NoSuchKey", "NotFound", "404"}
TAKEN = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
NO_CHECKSUM = {"NotImplemented", "InvalidRequest", "InvalidArgument", "501"}
NOBODY_THERE = (failures.EndpointConnectionError, failures.ConnectTimeoutError)
"""Raised before a request was sent: nothing listens, or the name is not known."""

_DENIED = {
    *("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"),
    *("AccountProblem", "NotSignedUp", "AllAccessDisabled", "InvalidSecurity", "Forbidden", "401", "403"),
}
_BAD_BYTES = {"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "InvalidDigest"}
_WRONG_REGION = {
    *("IllegalLocationConstraintException", "InvalidLocationConstraint"),
    *("AuthorizationHeaderMalformed", "PermanentRedirect"),
}
_NO_LOGIN = (
    failures.NoCredentialsError,
    failures.PartialCredentialsError,
    failures.CredentialRetrievalError,
    failures.ProfileNotFound,
    failures.TokenRetrievalError,
    failures.SSOError,
)
_NETWORK = (
    failures.ConnectionError,
    failures.HTTPClientError,
    failures.ResponseStreamingError,
    failures.IncompleteReadError,
    failures.ReadTimeoutError,
)
_ADDRESSES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_FILE = "AWS_SHARED_CREDENTIALS_FILE"


def code(error: failures.ClientError) -> str:
    """Return the server's own name of the failure."""
    return str(error.response.get("Error", {}).get("Code", ""))


def explain(error: Exception, doing: str, url: str, bucket: str) -> TunemillError:
    """Return the error of the program that ``error`` means, when ``doing`` something with ``url``."""
    if isinstance(error, failures.ClientError):
        return _answer(error, f"{doing} {url}", bucket)
    if isinstance(error, _NO_LOGIN):
        return DeniedError(f"no usable credentials for {url}: {_login(error)}")
    if isinstance(error, failures.SSLError):
        return ConfigurationError(f"{doing} {url} failed: {_certificate(error)}")
    if isinstance(error, NOBODY_THERE):
        return TransientError(
            f"{doing} {url} failed: {nobody(error)}; start the server or correct AWS_ENDPOINT_URL, "
            "and run it again"
        )
    if isinstance(error, _NETWORK):
        return TransientError(f"{doing} {url} failed, run it again: {_line(error)}")
    return ConfigurationError(f"{doing} {url} failed: {_address() or _line(error)}{_form(error)}")


def nobody(error: failures.BotoCoreError) -> str:
    """Say at which address nothing answers, and how that showed."""
    parts = urlsplit(str(error.kwargs.get("endpoint_url", "")))
    cause = error.kwargs.get("error")
    known = getattr(cause, "__cause__", None) or cause
    if isinstance(error, failures.ConnectTimeoutError):
        reason = "no reply"
    elif type(cause).__name__ == "NameResolutionError":
        reason = f"the name '{parts.hostname}' is not known"
    else:
        reason = str(getattr(known, "strerror", None) or known).lower()
    return f"nothing answers at {parts.scheme}://{parts.netloc.rpartition('@')[2]} ({reason})"


def _answer(error: failures.ClientError, doing: str, bucket: str) -> TunemillError:
    """Translate what the server answered."""
    name = code(error)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    message = error.response.get("Error", {}).get("Message") or ""
    reason = " ".join(f"{name} {message}".split())[:200]
    if name in _DENIED or (status in (401, 403) and name != "RequestTimeTooSkewed"):
        return DeniedError(f"{doing} was denied ({reason}): check the keys and their rights on the bucket")
    if name == "NoSuchBucket" or (status == 404 and name in ABSENT):
        return ConfigurationError(
            f"{doing} failed: there is no bucket '{bucket}' at this endpoint; "
            "'tunemill store create' makes it"
        )
    if name in _BAD_BYTES:
        return IntegrityError(f"{doing} failed: the bytes that arrived have another checksum ({reason})")
    if name in TAKEN:
        return TransientError(f"{doing} failed: the object changed meanwhile, run it again ({reason})")
    if name in _WRONG_REGION:
        return ConfigurationError(f"{doing} failed: set AWS_DEFAULT_REGION to the server's region ({reason})")
    if (status >= 500 and status != 501) or name in ("SlowDown", "RequestTimeout", "QuotaExceeded"):
        return TransientError(f"{doing} failed, run it again: {reason}")
    return ConfigurationError(f"{doing} failed: {reason or status}; 'tunemill store doctor' looks closer")


def _login(error: Exception) -> str:
    """Say what is wrong with the credentials' file, else which settings there are."""
    ways = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    named = os.environ.get(_FILE)
    fault = _file_fault(Path(named).expanduser()) if named else ""
    if fault and isinstance(error, failures.NoCredentialsError | failures.ProfileNotFound):
        return f"{_FILE} names {named}, {fault}; mend that or {ways}"
    return f"{ways}, {_FILE} or AWS_PROFILE ({_line(error)})"


def _file_fault(path: Path) -> str:
    if path.is_dir():
        return "which is a directory, as a container engine makes for a file that is not there"
    try:
        with path.open("rb"):
            pass
    except FileNotFoundError:
        return "which does not exist"
    except OSError as error:
        return f"which user {os.getuid()} cannot read ({error.strerror})"
    return f"which has no keys for the profile '{os.environ.get('AWS_PROFILE', 'default')}'"


def _certificate(error: Exception) -> str:
    line = _line(error)
    if "WRONG_VERSION_NUMBER" in line or "RECORD_LAYER_FAILURE" in line:
        return "the server does not speak TLS; its address may begin with http:// instead of https://"
    return f"the server's certificate is not trusted; name its authority's file in AWS_CA_BUNDLE ({line})"


def _address() -> str:
    """Say which variable holds no address of a server, if one does."""
    for name in _ADDRESSES:
        if value := os.environ.get(name):
            return (
                ""
                if _is_address(value)
                else f"{name} is '{value}', expected an address such as http://host:9000"
            )
    return ""


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False  # its port is no number below 65536
    return usable and not any(character.isspace() for character in text)


def _form(error: Exception) -> str:
    if isinstance(error, failures.ConfigParseError):
        return ": expected lines such as '[default]' and 'aws_access_key_id = …'"
    return ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

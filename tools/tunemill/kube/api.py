"""The API server, through the official client's connection, in plain JSON.

Objects stay as the server sent them and go to it as they were rendered: the client's typed models belong
to one release, and drop the fields of another in silence. Every refusal becomes one line with its exit
code here; what may pass by itself is tried again for ``PATIENCE`` seconds.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import urllib3
import yaml
from kubernetes.client import ApiClient, Configuration
from kubernetes.client.exceptions import ApiException
from kubernetes.config import ConfigException, load_incluster_config, load_kube_config

from tunemill import __version__
from tunemill.errors import ConfigurationError, DeniedError, TransientError

PATIENCE = 60.0  # seconds; a control plane that is upgraded answers again sooner
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
STREAM_SECONDS = 290  # a watch ends by itself before the 5 minutes after which proxies cut idle connections
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
FIELD_MANAGER = "tunemill"
RIGHT = re.compile(
    r'User "(?P<user>[^"]*)" cannot (?P<verb>\w+) resource "(?P<resource>[^"]+)" '
    r'in API group "(?P<group>[^"]*)"'
    r'(?: in the namespace "(?P<namespace>[^"]+)")?'
)

UNREADABLE = (ConfigException, yaml.YAMLError, OSError, ValueError, TypeError, KeyError, AttributeError)
"""What the client raises for a kubeconfig that is none."""

Json = dict[str, Any]
log = logging.getLogger("tunemill")


class Refused(ConfigurationError):
    """The server refused a request for a reason of its own; ``reason`` is the Status object's."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class NotFound(Refused):
    """There is no such object, namespace or kind."""


class Exists(Refused):
    """An object of that name is there already."""


class Expired(Refused):
    """The resource version is too old to go on from: list again."""


class Cut(Exception):
    """A stream ended in the middle; whoever reads it goes on from where it was."""


class Api:
    """One API server and one namespace of it."""

    def __init__(self, configuration: Configuration, namespace: str, where: str) -> None:
        configuration.retries = False  # tried again here, by the rules of this API
        configuration.keep_alive = True
        self._client = ApiClient(configuration)
        self._client.user_agent = f"tunemill/{__version__}"
        self.namespace = namespace
        self.where = where
        """The server in words, for messages."""

    @property
    def jobs(self) -> str:
        """Path of the namespace's Jobs."""
        return self.path("batch/v1", "jobs")

    @property
    def pods(self) -> str:
        """Path of the namespace's pods."""
        return self.path("v1", "pods")

    @property
    def events(self) -> str:
        """Path of the namespace's events."""
        return self.path("v1", "events")

    def path(self, version: str, plural: str) -> str:
        """Return the path of a kind in the namespace; ``version`` is as in ``apiVersion``."""
        root = f"/apis/{version}" if "/" in version else f"/api/{version}"
        return f"{root}/namespaces/{self.namespace}/{plural}"

    def get(self, path: str, **query: str) -> Json:
        """Read an object or a list."""
        return self.call("GET", path, query)

    def create(self, path: str, body: Json, dry_run: bool = False) -> Json:
        """Create an object, unknown fields refused; a dry run stores nothing.

        Raises:
            Exists: one of that name is there.
        """
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"}
        return self.call("POST", path, query | ({"dryRun": "All"} if dry_run else {}), body)

    def delete(self, path: str, uid: str, policy: str) -> Json:
        """Delete the object of that uid; ``policy`` is Background or Foreground."""
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": policy,
            "preconditions": {"uid": uid},
        }
        return self.call("DELETE", path, {}, options)

    def call(self, method: str, path: str, query: Mapping[str, str], body: Json | None = None) -> Json:
        """Send one request and return its answer.

        Raises:
            TransientError: the server did not answer in ``PATIENCE`` seconds.
            DeniedError: credentials are refused, or lack a right.
            Refused: the request is refused for another reason.
        """
        response = self._send(method, path, query, body, READ_SECONDS)
        for warning in response.headers.getlist("Warning"):
            log.warning("cluster: %s", _warning(warning))
        try:
            answer: Json = json.loads(response.data or b"{}")
        except (ValueError, urllib3.exceptions.HTTPError) as error:
            raise ConfigurationError(f"{self.where} answers no JSON: is it an API server?") from error
        return answer

    @contextmanager
    def lines(self, path: str, query: Mapping[str, str]) -> Iterator[Iterator[str]]:
        """Open a watch or a log and yield its whole lines.

        Raises:
            Cut: the connection was lost in the middle.
        """
        response = self._send("GET", path, query, None, STREAM_SECONDS + READ_SECONDS)
        try:
            yield _whole_lines(response)
        finally:
            response.close()

    def _send(
        self, method: str, path: str, query: Mapping[str, str], body: Json | None, read: float
    ) -> urllib3.BaseHTTPResponse:
        deadline, pause = time.monotonic() + PATIENCE, FIRST_PAUSE
        while True:
            try:
                response = self._once(method, path, query, body, read)
            except (urllib3.exceptions.HTTPError, ConnectionError) as error:
                failure, wait = f"{self.where} does not answer ({_plain(error)})", pause
            else:
                if 200 <= response.status < 300:
                    return response
                status = _status(response)
                if not _passes(response.status, status):
                    raise refusal(response.status, status, self.where)
                failure = (
                    f"{self.where} answers {response.status}: {status.get('message', 'no reason given')}"
                )
                wait = _retry_after(response) or pause
            if time.monotonic() + wait > deadline:
                raise TransientError(f"{failure}; tried for {PATIENCE:.0f} s, try again later")
            if pause == FIRST_PAUSE:
                log.info("%s; trying again for %.0f s", failure, PATIENCE)
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _once(
        self, method: str, path: str, query: Mapping[str, str], body: Json | None, read: float
    ) -> urllib3.BaseHTTPResponse:
        headers = {"Accept": "application/json"} | ({"Content-Type": "application/json"} if body else {})
        try:
            request = self._client.param_serialize(
                method,
                path,
                query_params=list(query.items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
            answer = self._client.call_api(*request, _request_timeout=(CONNECT_SECONDS, read))
        except ApiException as error:  # the transport's own: TLS
            raise ConfigurationError(
                f"no trusted connection to {self.where}: {_plain(error.reason)}"
            ) from error
        response: urllib3.BaseHTTPResponse = answer.response
        return response


def connect(context: str | None, namespace: str | None) -> Api:
    """Open the cluster of the kubeconfig, or inside a pod the cluster it runs in.

    Raises:
        ConfigurationError: there is no kubeconfig, or no such context in it.
    """
    configuration = Configuration()
    if "KUBERNETES_SERVICE_HOST" in os.environ and not _kubeconfig_exists():
        return _inside(configuration, namespace)
    try:
        load_kube_config(kubeconfig(), context, configuration, persist_config=False)
        own = _namespace_of(context)
    except UNREADABLE as error:
        raise ConfigurationError(_no_cluster(context, error)) from error
    return Api(configuration, namespace or own, configuration.host)


def kubeconfig() -> str:
    """Return the path or paths of the kubeconfig, as kubectl finds it."""
    return os.environ.get("KUBECONFIG") or str(Path("~/.kube/config").expanduser())


def current_context() -> str | None:
    """Return the kubeconfig's current context.

    Raises:
        ConfigurationError: there is no kubeconfig.
    """
    from kubernetes.config import list_kube_config_contexts

    try:
        _, active = list_kube_config_contexts(kubeconfig())
    except UNREADABLE as error:
        raise ConfigurationError(_no_cluster(None, error)) from error
    return str(active["name"]) if active else None


def refusal(code: int, status: Json, where: str) -> Exception:
    """Return the error that a refusal's Status object means."""
    message, reason = _plain(status.get("message") or f"HTTP {code}"), str(status.get("reason", ""))
    if code == 401:
        return DeniedError(
            f"{where} does not accept this kubeconfig's credentials: missing or expired, log in again"
        )
    if code == 403:
        return _forbidden(message, where)
    kinds = {404: NotFound, 409: Exists if reason == "AlreadyExists" else Refused, 410: Expired}
    return kinds.get(code, Refused)(f"the cluster refuses it: {message}", reason)


def _forbidden(message: str, where: str) -> Exception:
    right = RIGHT.search(message)
    if right and right["user"] == "system:anonymous":
        return DeniedError(f"{where} got no credentials from this kubeconfig: log in again")
    if right:
        resource = f"{right['resource']}.{right['group']}" if right["group"] else right["resource"]
        place = f"in namespace {right['namespace']}" if right["namespace"] else "in the whole cluster"
        return DeniedError(
            f"missing right: {right['verb']} {resource} {place}; ask your administrator for it"
        )
    if "exceeded quota" in message:
        return TransientError(f"the namespace's quota is used up: {message}")
    return Refused(f"the cluster refuses it: {message}", "Forbidden")


def _passes(code: int, status: Json) -> bool:
    """Say whether a refusal may pass by itself; a Conflict is another writer's, as of a quota's use."""
    return code in TRANSIENT or (code == 409 and status.get("reason") == "Conflict")


def _status(response: urllib3.BaseHTTPResponse) -> Json:
    """Return the Status object of a refusal; a proxy's page has none."""
    with suppress(ValueError, urllib3.exceptions.HTTPError):
        status = json.loads(response.data)
        if isinstance(status, dict):
            return status
    return {}


def _retry_after(response: urllib3.BaseHTTPResponse) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def _whole_lines(response: urllib3.BaseHTTPResponse) -> Iterator[str]:
    rest = b""
    try:
        for chunk in response.stream(amt=None):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line.decode("utf-8", "replace")
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise Cut from error
    if rest:
        yield rest.decode("utf-8", "replace")  # ended in order: a log's last line may have no newline


def _inside(configuration: Configuration, namespace: str | None) -> Api:
    try:
        load_incluster_config(configuration)
    except ConfigException as error:
        raise ConfigurationError(f"this pod has no API token: {_plain(error)}") from error
    own = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
    return Api(configuration, namespace or own.read_text("utf-8").strip(), "the cluster's API server")


def _namespace_of(context: str | None) -> str:
    from kubernetes.config import list_kube_config_contexts

    contexts, active = list_kube_config_contexts(kubeconfig())
    chosen = next((found for found in contexts if found["name"] == context), active) if context else active
    return str(chosen["context"].get("namespace") or "default")


def _kubeconfig_exists() -> bool:
    return any(Path(path).expanduser().exists() for path in kubeconfig().split(os.pathsep) if path)


def _no_cluster(context: str | None, error: Exception) -> str:
    if not _kubeconfig_exists():
        return f"there is no kubeconfig at {kubeconfig()}: get one for your cluster, or set KUBECONFIG"
    if context:
        return f"the kubeconfig {kubeconfig()} gives no context '{context}': {_plain(error)}"
    return f"the kubeconfig {kubeconfig()} gives no cluster: {_plain(error)}"


def _warning(header: str) -> str:
    """Return the text of an RFC 9111 warning: ``299 - "text"``."""
    quoted = re.match(r'\d+ \S+ "(.*)"$', header)
    return quoted[1].replace('\\"', '"') if quoted else header


def _plain(error: object) -> str:
    return " ".join(str(error).split())

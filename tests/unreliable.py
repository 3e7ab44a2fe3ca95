"""A proxy in front of an S3 server that misbehaves on purpose; for tests of what a client then does."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class Seen:
    """One request that passed through."""

    method: str
    path: str
    headers: dict[str, str]
    size: int


@dataclass
class Misbehaviour:
    """What to do to requests; each function is asked about every request and says yes or no."""

    lose_reply: Callable[[Seen], bool] = lambda _: False
    """Forward the request, then hang up instead of answering."""
    cut_body: Callable[[Seen], bool] = lambda _: False
    """Hang up after half of the answer's body."""
    refuse: Callable[[Seen], tuple[int, str] | None] = lambda _: None
    """Answer with this status and S3 error code without forwarding."""
    page: bytes | None = None
    """Answer everything with this text and status 200."""
    seen: list[Seen] = field(default_factory=list)


@contextlib.contextmanager
def unreliable(endpoint: str, misbehaviour: Misbehaviour) -> Iterator[str]:
    """Serve on a free port of loopback and yield the proxy's address."""
    target = urlsplit(endpoint).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = Seen(self.command, self.path, dict(self.headers), len(body))
            misbehaviour.seen.append(request)
            refused = misbehaviour.refuse(request)
            if misbehaviour.page is not None:
                self.answer(200, [("Content-Type", "text/html")], misbehaviour.page)
            elif refused is not None:
                text = f"<Error><Code>{refused[1]}</Code><Message>as told</Message></Error>"
                self.answer(refused[0], [("Content-Type", "application/xml")], text.encode())
            else:
                self.forward(request, body)

        def forward(self, request: Seen, body: bytes) -> None:
            connection = http.client.HTTPConnection(target)
            connection.request(self.command, self.path, body, request.headers)
            reply = connection.getresponse()
            data, headers = reply.read(), reply.getheaders()
            connection.close()
            if misbehaviour.lose_reply(request):
                self.hang_up()
                return
            self.answer(reply.status, headers, data, cut=misbehaviour.cut_body(request))

        def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
            self.send_response_only(status)
            skipped = ("transfer-encoding", "connection", "content-length")
            for name, value in headers:
                if name.lower() not in skipped:
                    self.send_header(name, value)
            given = [value for name, value in headers if name.lower() == "content-length"]
            length = given[0] if self.command == "HEAD" and given else str(len(data))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.hang_up()

        def hang_up(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *_: object) -> None:
            pass

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

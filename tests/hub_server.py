"""A server on the loopback that answers for the Hugging Face hub, one answer a model.

It speaks the part of the hub's protocol that a download of one file needs:
`HEAD` and `GET /{model}/resolve/{revision}/{file}`, the commit and the ETag in headers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Self

COMMIT = "c0ffee" + "0" * 34


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the server says when it is asked for a model's file."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    delay_seconds: float = 0.0
    """The wait before the answer, and before each byte of a dripping body."""
    drips: bool = False
    """Whether HEAD is answered at once and the body comes byte by byte."""
    tells_size: bool = True
    commit: str | None = COMMIT
    """What a hub tells and nothing else does."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request that the server received."""

    method: str
    path: str
    headers: Mapping[str, str]
    """By lower-case name."""

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")


def config(**keys: object) -> Answer:
    """The answer that holds a config of these keys."""
    return Answer(body=json.dumps(keys).encode())


class HubServer:
    """Serves `answers` (by model id or by path) and keeps the `requests` it got."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.requests: list[Request] = []
        self.stopping = threading.Event()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Closes the port: from now on connections are refused."""
        if not self.stopping.is_set():
            self.stopping.set()
            self._server.shutdown()
            self._server.server_close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def answer(self, path: str) -> Answer:
        """The answer for a path; a model that is not there is as on the hub."""
        model = path.strip("/").partition("/resolve/")[0]
        missing = Answer(status=404, headers={"X-Error-Code": "RepoNotFound"})
        return self.answers.get(path) or self.answers.get(model) or missing


class _Handler(http.server.BaseHTTPRequestHandler):
    server_hub: HubServer

    def do_HEAD(self) -> None:
        answer = self._receive()
        if not answer.drips:
            self.server_hub.stopping.wait(answer.delay_seconds)
        self._send_head(answer)

    def do_GET(self) -> None:
        answer = self._receive()
        self.server_hub.stopping.wait(answer.delay_seconds)
        self._send_head(answer)
        if not answer.drips:
            self.wfile.write(answer.body)
            return
        for byte in answer.body:
            if self.server_hub.stopping.wait(answer.delay_seconds):
                return
            self.wfile.write(bytes([byte]))

    def log_message(self, *_args: object) -> None:
        """Says nothing: a test's output is its own."""

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            # The client went away from an answer that it did not want to wait for.
            self.close_connection = True

    def _receive(self) -> Answer:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(method=self.command, path=self.path, headers=headers)
        self.server_hub.requests.append(request)
        return self.server_hub.answer(self.path)

    def _send_head(self, answer: Answer) -> None:
        self.send_response(answer.status)
        headers = {
            "ETag": f'"{hashlib.sha1(answer.body).hexdigest()}"',
            **({"X-Repo-Commit": answer.commit} if answer.commit else {}),
            **answer.headers,
        }
        if answer.tells_size:
            headers.setdefault("Content-Length", str(len(answer.body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

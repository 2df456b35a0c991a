"""The HTTP client of SGLang's server, against a small server of the standard library."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from a3_sglang.http_client import Client, NoAnswerError, StatusError
from a3_sglang.local_server import free_port

ERRORS = {
    "/openai": (400, b'{"object": "error", "message": "too long"}', "too long"),
    "/native": (422, b'{"error": {"message": "no such field", "type": "x"}}', "no such field"),
    "/plain": (500, b"it broke", "it broke"),
    "/string": (401, b'{"error": "Unauthorized"}', "Unauthorized"),
    "/empty": (404, b"", "Not Found"),
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, text, _ = ERRORS.get(self.path, (200, b"not JSON", ""))
        if self.path == "/key":
            text = json.dumps(self.headers["Authorization"]).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        if self.path == "/events":
            self.wfile.write(b"data: " + body + b"\n\ndata: " + body + b"\n\ndata: [DONE]\n\n")
        else:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.mark.parametrize("path", ERRORS)
def test_an_error_has_its_status_and_the_servers_message(url: str, path: str) -> None:
    status, _, message = ERRORS[path]
    with pytest.raises(StatusError) as error:
        Client(url).call(path)
    assert (error.value.status, str(error.value)) == (status, message)


def test_answers_are_decoded_if_they_are_json(url: str) -> None:
    assert Client(url).call("/text") == "not JSON"
    assert Client(url).call("/echo", {"a": [1]}) == {"a": [1]}
    assert Client(url, "secret").call("/key") == "Bearer secret"
    assert Client(url).call("/key") is None


def test_events_are_decoded(url: str) -> None:
    assert list(Client(url).events("/events", {"a": 1})) == [{"a": 1}, {"a": 1}]


@pytest.mark.parametrize("url", [f"http://127.0.0.1:{free_port()}", "localhost:30000", "no URL"])
def test_no_server_is_an_error_with_a_reason(url: str) -> None:
    with pytest.raises(NoAnswerError, match=r"."):
        Client(url).call("/health")

"""A server on this machine that speaks OpenAI's chat protocol as far as clients here use it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Trouble:
    """What a server answers instead of a chat reply.

    Attributes:
        status: HTTP status; 0 closes the connection without a word.
        body: What is sent.
        seconds: How long it takes first.
    """

    status: int = 500
    body: str = '{"error": {"message": "out of order"}}'
    seconds: float = 0.0


Say = Callable[[dict[str, Any]], "str | Trouble | None"]


@dataclass
class ChatServer:
    """The server's address, and what it was asked.

    Attributes:
        url: Base URL.
        say: Gives the answer to a request; may be replaced.
        requests: All requests, in the order of arrival, probes of a judge left out.
        keys: The authorisation of each request, probes included.
        most_at_once: The largest number of requests that were open at a time.
    """

    url: str
    say: Say
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    most_at_once: int = 0
    open: int = 0


def text_of(request: dict[str, Any]) -> str:
    """Return the last message's text, whether it came alone or with images."""
    content = request["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


@contextmanager
def serve(say: Say) -> Iterator[ChatServer]:
    """Run a server for the time of the block."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            request = json.loads(self.rfile.read(length))
            with lock:
                server.open += 1
                server.most_at_once = max(server.most_at_once, server.open)
                server.keys.append(self.headers.get("Authorization", ""))
                if "one word: yes" not in text_of(request):
                    server.requests.append(request)
            try:
                self.answer(server.say(request), request["model"])
            finally:
                with lock:
                    server.open -= 1

        def answer(self, said: str | Trouble | None, model: str) -> None:
            if isinstance(said, Trouble):
                time.sleep(said.seconds)
                if said.status == 0:
                    self.close_connection = True
                else:
                    self.send(said.status, said.body)
                return
            reply = {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": model,
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": said},
                    }
                ],
                "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
            }
            self.send(200, json.dumps(reply))

        def send(self, status: int, body: str) -> None:
            content = body.encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    httpd.handle_error = lambda *_: None  # type: ignore[method-assign]
    server = ChatServer(f"http://127.0.0.1:{httpd.server_port}/v1", say)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()

"""A client without manners: it sends any bytes, and may leave at any time."""

import contextlib
import dataclasses
import json
import socket
from typing import Any

PATIENCE = 60  # seconds
JSON = "Content-Type: application/json\r\n"


@dataclasses.dataclass(frozen=True)
class Said:
    """What a server said: 0 and nothing where it closed the connection without an answer."""

    status: int = 0
    headers: str = ""
    body: bytes = b""

    @property
    def code(self) -> str | None:
        """The code of an error."""
        return json.loads(self.body)["error"]["code"]

    @property
    def texts(self) -> list[str]:
        """The texts of a completion, or of a stream of one."""
        found: dict[int, str] = {}
        for piece in self.events if b"data: " in self.body else [json.loads(self.body)]:
            for choice in piece["choices"]:
                found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
        return [found[index] for index in sorted(found)]

    @property
    def events(self) -> list[Any]:
        """The events of a stream that was not cut off."""
        lines = self.body.decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""], lines[-2:]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def connect(address: tuple[str, int]) -> socket.socket:
    return socket.create_connection(address, timeout=PATIENCE)


def head(size: int, path: str = "/v1/completions", more: str = JSON, method: str = "POST") -> bytes:
    start = f"{method} {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n"
    return f"{start}{more}Content-Length: {size}\r\n\r\n".encode()


def send(address: tuple[str, int], body: bytes, **how: str) -> Said:
    """Send a request, and return the whole answer."""
    with connect(address) as connection:
        with contextlib.suppress(OSError):  # it may have answered before it read all
            connection.sendall(head(len(body), **how) + body)
        return read(connection)


def read(connection: socket.socket) -> Said:
    """Return what comes until the server closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(1 << 16):
            found += piece
    start, _, body = found.partition(b"\r\n\r\n")
    if not start.startswith(b"HTTP/1.1 "):
        return Said()
    headers = start.decode("latin-1")
    if "transfer-encoding: chunked" in headers.lower():
        body = _joined(body)
    return Said(int(headers.split()[1]), headers, body)


def _joined(body: bytes) -> bytes:
    """Return the chunks of a body that were sent."""
    found = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        count = int(size or b"0", 16)
        found, body = found + body[:count], body[count + 2 :]
    return found

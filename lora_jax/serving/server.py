"""Run the HTTP interface on a port until it is asked to stop."""

import socket
import threading
from typing import Any

import uvicorn

from lora_jax.core.errors import LoraError
from lora_jax.serving.scheduler import Scheduler

_BACKLOG = 2048
_LOOK_AFTER = 1  # second
_LAST_ANSWERS = 5  # seconds for what is done to reach its clients


class AddressError(LoraError):
    """The server cannot listen at an address."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 is any free one.

    Raises:
      AddressError: the address is in use or does not exist.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(address)
            found.listen(_BACKLOG)
        except OSError:
            found.close()
            raise
    except (OSError, OverflowError) as error:
        raise AddressError(
            f"cannot listen on {host}:{port}: {error}; choose another --host or --port"
        ) from None
    return found


class Server:
    """An HTTP server in a thread; its scheduler runs in another.

    Args:
      app: the ASGI application.
      scheduler: of its jobs.
      listener: where requests come from.

    Attributes:
      url: where the server listens.
    """

    def __init__(self, app: Any, scheduler: Scheduler, listener: socket.socket) -> None:
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
        config.timeout_graceful_shutdown = _LAST_ANSWERS
        self._server, self.scheduler, self._listener = uvicorn.Server(config), scheduler, listener
        self._thread = threading.Thread(target=self._serve, name="http", daemon=True)
        self._ended = threading.Event()
        host, port = listener.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def start(self) -> None:
        """Start both threads."""
        self.scheduler.start()
        self._thread.start()

    def wait(self, asked: threading.Event) -> None:
        """Wait until the event is set, or the server has ended by itself, which sets it."""
        while not asked.wait(_LOOK_AFTER):
            if self._ended.is_set():
                asked.set()

    def stop(self, seconds: float) -> None:
        """Take no more requests, finish those that are there within some seconds, and end.

        Those that are not done by then get an error.
        """
        self.scheduler.drain(seconds)
        self.scheduler.wait_idle(seconds + _LAST_ANSWERS)
        self._server.should_exit = True
        self._thread.join()
        self.scheduler.stop()

    def _serve(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
        finally:
            self._listener.close()
            self._ended.set()

"""Who may ask the server: clients that have its key, and web pages of some origins."""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from lora_jax.serving.errors import RequestError

#: Paths that need no key: the page, which asks for it, and the question whether the server runs.
OPEN = ("/", "/health")
_SCHEME = b"bearer "


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
      key: what clients must send; None for nothing.
      origins: of web pages that may ask, `*` for all; the server's own page always may.
    """

    key: str | None = field(default=None, repr=False)
    origins: Sequence[str] = ()

    def middleware(self) -> list[Middleware]:
        """Return what requests pass before their route, the first one outside."""
        found = []
        if self.origins:  # outside, so that pages can read what a refusal says
            cors = Middleware(
                CORSMiddleware,
                allow_origins=list(self.origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["Retry-After"],
            )
            found.append(cors)
        if self.key is not None:
            found.append(Middleware(KeyCheck, key=self.key))
        return found


class KeyCheck:
    """Refuse requests without the key.

    Args:
      app: what answers the others.
      key: the key.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._wanted = app, _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or scope["path"] in OPEN or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        error = RequestError(
            "this server needs its API key; send the header Authorization: Bearer KEY with it",
            status=401,
            code="invalid_api_key",
        )
        head = {"WWW-Authenticate": "Bearer"}
        await JSONResponse(error.body(), error.status, head)(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        word = given[0] if len(given) == 1 else b""
        if word[: len(_SCHEME)].lower() != _SCHEME:
            return False
        # Digests are of one length, and the comparison takes the same time wherever they differ.
        return hmac.compare_digest(_digest(word[len(_SCHEME) :].strip()), self._wanted)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
